"""Scenes of known depth, tasks of vision on them, and what an answer scores."""

import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from qwen_image_fast.training.evaluation import evaluate_vision as report
from qwen_image_fast.training.evaluation.cli import app
from qwen_image_fast.training.synthesis import make, make_edit, scenes, tiny, vision
from qwen_image_fast.training.synthesis.colours import COLOURS
from qwen_image_fast.training.synthesis.recipe import VISION
from qwen_image_fast.training.synthesis.scenes import BACKDROP, FAR, GROUND, NEAR, Camera, Solid, World

LIGHT = (0.0, 1.0, 0.0)
CAMERA = Camera()


def world(*solids, light=LIGHT):
    return World(solids, "white", "yellow", light)


def recipe(**changes):
    return tiny(64, pure=0, scenes=1, **changes)


def test_the_middle_of_the_ground_is_as_far_as_the_camera():
    view = scenes.render(world(), CAMERA, (65, 65))
    assert view.ids[32, 32] == GROUND and view.ids[0, 0] == BACKDROP
    assert view.depth[32, 32] == pytest.approx(CAMERA.distance, abs=1e-5)
    assert np.isinf(view.depth[0, 0])
    assert tuple(view.image[32, 32]) == COLOURS["white"].rgb  # the light is above: it loses nothing


@pytest.mark.parametrize("x, z", [(0.0, 0.0), (0.4, -0.3)])
def test_the_depth_of_a_ball(x, z):
    ball = Solid("ball", "red", x, z, 0.3)
    view = scenes.render(world(ball), CAMERA, (257, 257))
    position, (_, _, forward) = CAMERA.axes()
    nearest = (np.array([x, 0.3, z]) - position) @ forward - 0.3
    assert view.depth[view.ids == 1].min() == pytest.approx(nearest, abs=1e-3)


@pytest.mark.parametrize("shape", ["ball", "box"])
def test_the_rays_that_are_cast_at_a_solid_are_all_that_meet_it(shape):
    solid, (position, axes) = Solid(shape, "red", 0.3, -0.2, 0.25, 0.4), CAMERA.axes()
    rays = scenes._rays(CAMERA, axes, (96, 96), 1)
    distance, _ = (scenes._ball if shape == "ball" else scenes._cube)(solid, position, rays)
    met = set(np.flatnonzero(np.isfinite(distance)))
    near = set(scenes._near(solid, position, rays))
    assert met and met <= near and len(near) < len(rays) / 4


@pytest.mark.parametrize("turn", [0.0, 0.4, 1.2])
def test_the_depth_of_a_box_is_least_at_its_nearest_corner(turn):
    box = Solid("box", "blue", 0.2, 0.1, 0.25, turn)
    view = scenes.render(world(box), CAMERA, (257, 257))
    position, (_, _, forward) = CAMERA.axes()
    along = np.array([math.cos(turn), 0, -math.sin(turn)]), np.array([math.sin(turn), 0, math.cos(turn)])
    corners = [
        np.array([0.2, 0.25, 0.1]) + 0.25 * (a * along[0] + b * along[1]) + np.array([0, 0.25 * c, 0])
        for a, b, c in itertools.product((-1, 1), repeat=3)
    ]
    nearest = min((corner - position) @ forward for corner in corners)
    assert view.depth[view.ids == 1].min() == pytest.approx(nearest, abs=0.01)


def test_a_solid_throws_a_shadow_away_from_the_light():
    light = (math.sqrt(0.5), math.sqrt(0.5), 0.0)  # from the right
    view = scenes.render(world(Solid("ball", "red", 0.0, 0.0, 0.2), light=light), CAMERA, (129, 129))
    ground = np.where(view.ids == GROUND, view.image[..., 0].astype(float), np.nan)
    lit = 250 * (0.5 + 0.5 * math.sqrt(0.5))
    columns = np.flatnonzero((view.ids == 1).any(0))
    left, right = ground[:, : columns[0]], ground[:, columns[-1] + 1 :]
    assert np.nanmin(left) == pytest.approx(125, abs=1)
    assert np.nanmin(right) == pytest.approx(lit, abs=1)


def test_what_is_near_moves_right_as_the_camera_moves_left():
    ball = world(Solid("ball", "red", 0.0, 0.6, 0.2))
    column = [np.flatnonzero((scenes.render(ball, c, (64, 64)).ids == 1).any(0)).mean()
              for c in (CAMERA, scenes.turned(CAMERA, 45))]  # fmt: skip
    assert column[1] > column[0] + 8


def test_what_is_held_out_is_never_trained_on():
    def seen(split):
        drawn = [make(recipe(split=split), 0, index) for index in range(60)]
        return {(one.colours["ground"], *sorted(one.caption.split(" on ")[0].split(" and "))) for one in drawn}

    assert not seen("train") & seen("held_out")


@pytest.mark.parametrize("language, shown", [("en", "before"), ("zh", "墙前")])
def test_a_scene_and_its_caption(language, shown):
    for index in range(12):
        one = make(recipe(languages=(language,)), 1, index)
        assert shown in one.caption and not one.lines and one.strategy == "scenes"
        assert len(one.boxes) == sum(role.startswith("solid") for role in one.colours)
        for role, name in one.colours.items():
            assert COLOURS[name].called(language) in one.caption, role
        assert np.array_equal(one.image, make(recipe(languages=(language,)), 1, index).image)


def test_every_kind_of_task_is_made_and_has_its_answer():
    pairs = [make_edit(recipe(), 0, index) for index in range(60)]
    assert {pair.kind for pair in pairs} == set(VISION)
    for pair in pairs:
        assert pair.source.shape == pair.target.shape and pair.mask.all() and not pair.target_lines
        if pair.kind == "edges":
            assert set(np.unique(pair.target)) == {0, 255}
        if pair.kind == "colourise":
            assert (np.ptp(pair.source, axis=2) == 0).all() and (np.ptp(pair.target, axis=2) > 0).any()


def test_a_picture_of_depth_gives_the_depth_back():
    depth = np.linspace(NEAR, FAR, 500, dtype=np.float32)[None]
    assert np.abs(vision.depth_of(vision.depth_picture(depth)) / depth - 1).max() < 0.004
    assert vision.depth_picture(np.array([[np.inf, NEAR, FAR]])).max(2).tolist() == [[0, 255, 0]]


def test_segments_have_the_colours_of_the_solids_and_black_ones_grey():
    found = set()
    for one in report.held_out_tasks("segment", 40, size=64):
        colours = {tuple(c) for c in one.pair.target.reshape(-1, 3)} - {(0, 0, 0)}
        if one.wanted:
            assert colours == {(255, 255, 255)}
            assert scenes.solid_name(one.world.solids[one.wanted - 1], "en") in one.pair.instruction
        else:
            assert colours == set(one.colours()) and "all" in one.pair.instruction
            found |= {solid.colour for solid in one.world.solids}
    assert "black" in found and vision.segment_colour("black") == COLOURS["grey"].rgb


def test_depth_scores_by_hand():
    truth = np.array([[1.6, 2.0, 3.2]])
    every = np.ones(truth.shape, bool)
    assert report.depth_scores(7 / truth - 3, truth, every) == (pytest.approx(0, abs=1e-12), 1.0)
    # Nothing told: the mean of 1/d, (0.625 + 0.5 + 0.3125) / 3, is a depth of 48/23 everywhere.
    flat = 48 / 23
    wanted = (abs(flat - 1.6) / 1.6 + abs(flat - 2.0) / 2.0 + abs(flat - 3.2) / 3.2) / 3
    assert report.depth_scores(np.full(truth.shape, 9.0), truth, every) == (pytest.approx(wanted), pytest.approx(1 / 3))
    # Aligned on the first two, scored on the last: 1/d = 0.625 - 0.125 (x - 1) at x = 3 is 0.375.
    only = np.array([[False, False, True]])
    found = report.depth_scores(np.array([[1.0, 2.0, 3.0]]), truth, only, ~only)
    assert found == (pytest.approx((3.2 - 1 / 0.375) / 3.2), 1.0)


def test_masks_and_edges_by_hand():
    made, wanted = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    made[:, :2], wanted[:2] = True, True
    assert report.intersection_over_union(made, wanted) == pytest.approx(4 / 12)
    assert report.intersection_over_union(~made & made, ~made & made) == 1.0
    lines = {column: np.arange(9)[None].repeat(9, 0) == column for column in (2, 3, 6)}
    assert report.edge_f_score(lines[3], lines[2]) == 1.0
    assert report.edge_f_score(lines[6], lines[2]) == 0.0
    assert report.edge_f_score(lines[3] | lines[6], lines[2]) == pytest.approx(2 * 0.5 / 1.5)
    assert report.edge_f_score(lines[2] & lines[3], lines[2]) == 0.0


def test_right_answers_score_best_and_trivial_ones_are_beside_them(tmp_path):
    tasks = [one for kind in VISION for one in report.held_out_tasks(kind, 3, size=64)]
    answers = list(report.evaluate(lambda pairs, first: [pair.target for pair in pairs], tasks, batch=4))
    totals = report.write_report(answers, tmp_path, "right", {"count": 3})
    best = {"depth": {"δ1": 1.0}, "segment": {"IoU": 1.0, "IoU by solid": 1.0}, "edges": {"F": 1.0}}
    for kind, wanted in best.items():
        assert wanted.items() <= totals[kind]["model"].items()
    assert totals["depth"]["model"]["AbsRel"] < 0.003 < 0.03 < totals["depth"]["trivial"]["AbsRel"]
    for kind in ("view", "colourise"):
        assert totals[kind]["model"]["PSNR"] > 60 > 30 > totals[kind]["trivial"]["PSNR"]
    assert 0.5 < totals["edges"]["trivial"]["F"] < 1 and totals["segment"]["trivial"]["IoU"] < 0.5
    assert json.loads((tmp_path / "results.json").read_text())["summary"]["edges"]["trivial answer"]
    assert "source, answer, right answer" in (tmp_path / "report.html").read_text()
    with Image.open(tmp_path / "answers.png") as shown:
        pixels = np.asarray(shown)
    first = tasks[0].pair  # source, answer and right answer, the last two alike here
    for place, wanted in enumerate((first.source, first.target, first.target)):
        left = 8 + place * 68
        assert np.array_equal(pixels[24 : 24 + 64, left : left + 64], wanted)


def test_the_command(tmp_path):
    out = tmp_path / "out"
    options = ["--count", "1", "--steps", "1", "--size", "64", "--out", str(out)]
    result = CliRunner().invoke(app, ["vision", "tiny", *options])
    assert result.exit_code == 0, result.output
    assert "| depth | AbsRel |" in result.stdout and (out / "report.html").exists()
    rows = json.loads((out / "results.json").read_text())["pictures"]
    assert [row["task"] for row in rows] == list(VISION) and all(row["right, through its VAE"] for row in rows)


@pytest.mark.parametrize(
    "option, value, said",
    [
        ("--tasks", "depth,smell", "of depth, segment, view, edges, colourise, got smell"),
        ("--language", "fr", "en or zh, got fr"),
    ],
)
def test_bad_options_are_said_before_a_model_is_read(option, value, said, tmp_path):
    result = CliRunner().invoke(app, ["vision", "tiny", option, value, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert said in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    "changes, said", [({"ground_colours": ("white",)}, "two or more"), ({"vision": ("smell",)}, "vision must")]
)
def test_bad_recipes(changes, said):
    with pytest.raises(ValueError, match=said):
        recipe(**changes)
