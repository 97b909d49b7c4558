"""Rewards on renderings whose truth is known, a judge that misbehaves, and what rewards count against each other."""

import dataclasses
import json

import numpy as np
import pytest

from qwen_image_fast.chat import EndpointError
from qwen_image_fast.training.evaluation.bands import bands
from qwen_image_fast.training.recipe.rewards import AdvantageRecipe, GuardsRecipe, JudgeReward, RewardRecipe, TextReward
from qwen_image_fast.training.rewards.judge import Judge, read_score
from qwen_image_fast.training.rewards.make import make_reward, make_rewards
from qwen_image_fast.training.rewards.reward import Asked, RewardError, asked_of
from qwen_image_fast.training.rewards.texts import Text, likeness
from qwen_image_fast.training.rollout.advantages import advantages, dead_groups, normalised, own_pairs
from qwen_image_fast.training.synthesis import tiny
from qwen_image_fast.training.synthesis.colours import COLOURS
from qwen_image_fast.training.synthesis.editing import make_edit
from qwen_image_fast.training.synthesis.generator import make
from qwen_image_fast.training.tasks.guards import Guards, colour_entropy, edge_density
from qwen_image_fast.training.tasks.task import StopRun

RECIPE = tiny(128, max_lines=1, max_letters=6, random_strings=0.0)


def rendering(index, recipe=RECIPE):
    sample = make(recipe, 3, index)
    return np.asarray(sample.image), asked_of(sample.caption, sample)


@pytest.mark.parametrize(
    "read, wanted, value",
    [("cat", "cat", 1.0), ("ca t", "cat", 1.0), ("Cat", "cat", 2 / 3), ("cats", "cat", 2 / 3), ("", "cat", 0.0),
     ("xcatxxxxx", "cat", 0.0), ("", "", 1.0), ("a", "", 0.0)],
)  # fmt: skip
def test_likeness(read, wanted, value):
    """Extra characters cost: the text within spam is worth nothing."""
    assert likeness(read, wanted) == pytest.approx(value)


@pytest.mark.parametrize("layout", ["band", "page"])
def test_text_and_colour_and_layout_of_renderings(layout):
    pytest.importorskip("rapidocr")
    text, colour, where = (
        Text(TextReward(layout)),
        make_reward(RewardRecipe("colour")),
        make_reward(RewardRecipe("layout")),
    )
    pictures, asked = map(list, zip(*(rendering(i) for i in range(6))))
    assert text(pictures, asked).count(1.0) >= 5
    assert colour(pictures, asked) == [1.0] * 6
    assert min(where(pictures, asked)) == 1.0
    others = asked[1:] + asked[:1]
    assert max(text(pictures, others)) < 0.7
    recoloured = [dataclasses.replace(a, colours={**a.colours, "ground": _other(a.colours["ground"])}) for a in asked]
    assert text(pictures, recoloured) == [value / 2 for value in text(pictures, asked)]
    assert colour(pictures, recoloured) == [0.5] * 6
    moved = [np.roll(p, 48, axis=0) for p in pictures]
    assert max(where(moved, asked)) < 0.5


def _other(name):
    return "yellow" if name != "yellow" else "white"


def test_what_a_reward_cannot_judge():
    bare = Asked("a red square")
    for kind, sentence in (("text", "quote a text"), ("colour", "with colours"), ("layout", "layout is known"),
                           ("edit", "target is known")):  # fmt: skip
        assert sentence in make_reward(RewardRecipe(kind)).refuses(bare)
    mauve = Asked('"cat" in mauve', ("cat",), colours={"text": "mauve"})
    for kind in ("text", "colour"):
        assert "colours.text must be of red, " in make_reward(RewardRecipe(kind)).refuses(mauve)
    for colours in ({"accent": "red"}, {"text": "red"}):  # no text is named
        assert "of the ground or of a text" in make_reward(RewardRecipe("colour")).refuses(Asked("a", colours=colours))
    page = Asked('"cat" in red', ("cat",))
    assert Text(TextReward("band")).refuses(page) and Text().refuses(page) is None


def test_bands_do_not_overlap():
    """Two texts below each other, and two beside each other."""
    stacked = bands([(10, 20, 60, 40), (10, 44, 60, 64)], (128, 128))
    assert stacked == [(0, 13, 128, 44), (0, 40, 128, 71)]
    (_, _, left, _), (right, *_) = bands([(0, 20, 50, 40), (70, 20, 120, 40)], (128, 128))
    assert left == right == 60


def test_an_edit_is_rewarded_for_what_was_asked_and_what_was_kept():
    reward = make_reward(RewardRecipe("edit"))
    recipe = tiny(128, max_lines=1, max_letters=6, edits=("colour", "remove", "move"))
    pairs = [make_edit(recipe, 5, i) for i in range(6)]
    asked = [asked_of(pair.instruction, pair) for pair in pairs]
    assert [a.edit for a in asked] == pairs
    assert reward([pair.target for pair in pairs], asked) == [1.0] * 6
    assert max(reward([pair.source for pair in pairs], asked)) == 0.0
    noisy = [np.where(p.mask[..., None], p.target, 255 - p.target).astype(np.uint8) for p in pairs]
    assert max(reward(noisy, asked)) == 0.0


def test_two_rewards_of_one_kind_are_refused():
    with pytest.raises(ValueError, match="rewards must each be another one, got colour twice"):
        make_rewards([RewardRecipe("colour"), RewardRecipe("colour")])


# A judge

PICTURES = [np.full((8, 8, 3), n, np.uint8) for n in range(3)]
ASKED = [Asked(f"prompt {n}") for n in range(3)]
SETTINGS = JudgeReward("http://nowhere/v1", "m", attempts=3, parallel=1)


def judge(said, folder=None, **changes):
    """A judge whose endpoint says this, or raises it; and what it was asked."""
    asked = []

    def chat(system, question, pictures):
        asked.append(question)
        answer = said[min(len(asked), len(said)) - 1]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Judge(dataclasses.replace(SETTINGS, **changes), folder, chat, wait=lambda seconds: None), asked


def test_a_judge_is_asked_until_it_answers():
    nonsense = ["very nice!", '{"score": "high"}', 'Sure: ```json\n{"score": 5}\n```']
    one, asked = judge(nonsense)
    assert one(PICTURES[:1], ASKED[:1]) == [0.5] and len(asked) == 3
    assert "prompt 0" in asked[0] and "from 0, the worst, to 10, the best" in asked[0]


@pytest.mark.parametrize(
    "answer, sentence",
    [
        ("I cannot judge this", "no score after 3 tries: .*must hold"),
        ('{"score": 11}', "no score after 3 tries: .*must be from 0 to 10, got 11"),
        (EndpointError("judge: timed out"), "no score after 3 tries: judge: timed out; what it said before is kept"),
        (EndpointError("judge: 401", 401), "check endpoint, model and api_key_file"),
    ],
)
def test_a_judge_that_never_answers_is_no_zero(answer, sentence):
    with pytest.raises(RewardError, match=sentence):
        judge([answer])[0](PICTURES[:1], ASKED[:1])


def test_a_judge_is_never_asked_twice(tmp_path):
    """It goes down at the third picture; the resumed run asks for that alone."""
    one, _ = judge(['{"score": 2}', '{"score": 4}', EndpointError("down")], tmp_path)
    with pytest.raises(RewardError):
        one(PICTURES, ASKED)
    with open(tmp_path / "judged.jsonl", "a") as file:
        file.write('{"key": "half')
    again, more = judge(['{"score": 6}'], tmp_path)
    assert again(PICTURES, ASKED) == [0.2, 0.4, 0.6] and len(more) == 1
    other, third = judge(['{"score": 1}'], tmp_path, question="Is it sharp?")
    assert other(PICTURES, ASKED) == [0.1] * 3 and len(third) == 3


def test_the_mean_of_several_answers():
    one, asked = judge(['{"score": 2}', '{"score": 4}'], answers=2)
    assert one(PICTURES[:1], ASKED[:1]) == [pytest.approx(0.3)] and len(asked) == 2


@pytest.mark.parametrize("answer", ["", "{}", "[3]", '{"score": true}', '{"score": null}', "NaN", '{"score": NaN}'])
def test_what_is_no_score(answer):
    with pytest.raises(ValueError):
        read_score(answer, 0, 10)


# What rewards count


def test_advantages_by_hand():
    """Mean of the prompt, std of the round without its dead group: the distances are -1, 1 and -2, 2, so sqrt(2.5)."""
    rewards = np.array([[1.0, 3.0], [0.0, 4.0], [5.0, 5.0]])
    assert dead_groups(rewards).tolist() == [False, False, True]
    found = normalised(rewards, AdvantageRecipe())
    std = np.sqrt(2.5) + 1e-4
    assert found == pytest.approx(np.array([[-1, 1], [-2, 2], [0, 0]]) / std)
    by_prompt = normalised(rewards, AdvantageRecipe(std="prompt"))
    assert by_prompt == pytest.approx(np.array([[-1, 1], [-1, 1], [0, 0]]), abs=1e-3)
    assert np.abs(normalised(rewards, AdvantageRecipe(clip=0.5))).max() == 0.5


def test_rewards_apart_do_not_rule_by_their_spread():
    wide, narrow = np.array([[0.0, 100.0, 50.0]]), np.array([[1.0, 0.0, 0.5]])
    apart, total = advantages({"a": wide, "b": narrow}, [1, 1], AdvantageRecipe())
    assert apart == pytest.approx(np.zeros((1, 3)), abs=1e-2)
    together, _ = advantages({"a": wide, "b": narrow}, [1, 1], AdvantageRecipe(combine="sum"))
    assert together[0, 1] > 1 and total[0].tolist() == [0.5, 50.0, 25.25]
    assert (normalised(np.ones((2, 3)), AdvantageRecipe()) == 0).all()


@pytest.mark.parametrize(
    "rewards, pairing, pairs",
    [
        ([1, 0, 1, 0.5], "all", [(0, 1), (2, 3)]),
        ([1, 1, 1, 0], "all", [(0, 3), (1, 3), (2, 3)]),
        ([1, 0, 1, 0.5], "ends", [(0, 1)]),
        ([1, 1, 1, 0], "once", [(0, 3)]),
        ([0.5, 1, 0, 0, 1], "once", [(1, 2), (4, 3)]),
        ([1, 1], "once", []),
        ([1, 1, 1, 1], "all", []),
        ([1, 0.98], "all", []),
    ],
)
def test_own_pairs(rewards, pairing, pairs):
    assert own_pairs(np.array(rewards, float), 0.05, pairing) == pairs


# Guards


def look(**changes):
    return {"held_out_reward": 0.9, "held_out_edges": 0.02, "held_out_entropy": 1.0, "drift": 0.0, **changes}


@pytest.mark.parametrize(
    "changes, sentence",
    [({"held_out_edges": 0.005}, "edge density .* fell from 0.02 to 0.005"),
     ({"held_out_entropy": 0.4}, "entropy .* fell from 1 to 0.4"),
     ({"held_out_reward": 0.6}, "reward of held-out prompts fell from 0.900 to 0.600"),
     ({"drift": 0.2}, "drifted from where it began by 0.2")],
)  # fmt: skip
def test_a_guard_waits_and_then_stops(changes, sentence):
    guards = Guards(GuardsRecipe(patience=2, drift=0.1))
    assert guards.look(look()) == [] and guards.look(look(**changes)) == []
    assert guards.look(look()) == [] and guards.look(look(**changes)) == []  # counted anew
    again = Guards(GuardsRecipe(patience=2, drift=0.1))
    again.load(json.loads(json.dumps(guards.state())))
    with pytest.raises(StopRun, match=sentence):
        again.look(look(**changes))
    said = Guards(GuardsRecipe(patience=1, drift=0.1, stop=False))
    said.look(look())
    assert len(said.look(look(**changes))) == 1 and said.look(look(**changes)) == []


def test_guards_of_rounds_and_updates():
    guards = Guards(GuardsRecipe(patience=1, unlearning=2))
    with pytest.raises(StopRun, match="96% of the prompts have pictures of one reward"):
        guards.round({"dead_groups": 0.96})
    with pytest.raises(StopRun, match="60% of the ratios are clipped"):
        guards.update({"clipped": 0.6})
    assert guards.update({"delta_chosen": 0.1, "delta_rejected": 0.2}) == []
    assert guards.update({"delta_chosen": -0.1, "delta_rejected": 0.2}) == []
    assert guards.update({"delta_chosen": 0.1, "delta_rejected": 0.2}) == []
    with pytest.raises(StopRun, match="both pictures of the pairs got worse in 2 updates"):
        guards.update({"delta_chosen": 0.1, "delta_rejected": 0.2})


def test_an_emptied_picture_has_fewer_edges_and_colours():
    full, _ = rendering(0)
    empty = np.full_like(full, COLOURS["black"].rgb[0])
    assert edge_density(empty) == 0 < edge_density(full) and colour_entropy(empty) == 0 < colour_entropy(full)
    halves = np.concatenate([np.zeros((4, 8, 3)), np.full((4, 8, 3), 255)]).astype(np.uint8)
    assert colour_entropy(halves) == 1.0
    assert edge_density(halves) == pytest.approx((8 / 56 + 0) / 2)
