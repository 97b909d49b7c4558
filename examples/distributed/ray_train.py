"""Train on a Ray cluster, one process for each GPU: what torchrun does, with Ray placing the processes.

    python examples/distributed/ray_train.py --ranks 16 full/text-to-image model.folder=/models/Qwen-Image \
        data.source=/data batch=16 accumulate=1 --out /shared/run

Without GPUs: `--ranks 2 --cpus`. The folder of the run must be one that every machine sees. Start it again with
`--resume` after a failure; the number of ranks may be another one.
"""

import argparse
import os
import socket

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy


@ray.remote
class Rank:
    def address(self) -> tuple[str, int]:
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def train(self, rank: int, ranks: int, address: tuple[str, int], recipe: str, changes: list[str], options: dict):
        host, port = address
        # Ray shows an actor its own GPU alone, which is then number 0.
        place = {"MASTER_ADDR": host, "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": 0}
        os.environ.update({name: str(value) for name, value in place.items()})
        from qwen_image_fast.training.run import train

        return train(recipe, changes, **options).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("changes", nargs="*")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--out", default="outputs/run")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cpus", action="store_true")
    arguments = parser.parse_intermixed_args()
    ray.init()
    each = {"CPU": 1} if arguments.cpus else {"CPU": 8, "GPU": 1}
    group = placement_group([each] * arguments.ranks, strategy="PACK")
    ray.get(group.ready())
    ranks = [
        Rank.options(
            num_cpus=each["CPU"],
            num_gpus=each.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i),
        ).remote()
        for i in range(arguments.ranks)
    ]
    address = ray.get(ranks[0].address.remote())
    options = {"folder": os.path.abspath(arguments.out), "resume": arguments.resume}
    done = [
        rank.train.remote(i, len(ranks), address, arguments.recipe, arguments.changes, options)
        for i, rank in enumerate(ranks)
    ]
    print(f"trained to step {ray.get(done)[0]}; the model is in {options['folder']}/model")


if __name__ == "__main__":
    main()
