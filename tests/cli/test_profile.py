"""``turbomoe profile`` and ``turbomoe simulate``, and profiles in other verbs: files, tables, refusals."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.cli.tiny_chat import Turbomoe, write_chat_model
from tests.insight.routing import dice_trace, model
from turbomoe.cli import main as cli
from turbomoe.cli.simulate import parse_slots
from turbomoe.errors import SettingsError
from turbomoe.insight.profile import Profile
from turbomoe.insight.trace import Trace

CACHE = ("--moe-cache", "1M")


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("models") / "moe.gguf", family="qwen35moe")


@pytest.fixture(scope="session")
def other_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("models") / "moe.gguf", family="qwen3moe")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("It was a dark and stormy night; the rain fell in torrents. " * 20)
    return path


@pytest.fixture(scope="session")
def taken_once(moe: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taken")
    line = ["profile", "-m", moe, "--text", text, "--domain", "rain", "--tokens", "90", "-c", "36"]
    assert cli.main([str(part) for part in [*line, "-o", folder / "p", "--trace", folder / "t"]]) == 0
    return folder


@pytest.fixture
def taken(taken_once: Path, tmp_path: Path) -> Path:
    """A folder of this test with a profile ``p`` and a trace ``t``."""
    return Path(shutil.copytree(taken_once, tmp_path / "taken"))


def test_the_files_hold_what_was_run(taken: Path) -> None:
    profile, trace = Profile.load(taken / "p"), Trace.load(taken / "t")
    stats = profile.domains["rain"]
    # 90 tokens are sequences of 36, 36 and 18; a quarter of each is its prompt
    assert stats.tokens.tolist() == [9 + 9 + 4, 27 + 27 + 14]
    assert (stats.counts.sum(axis=2) == stats.tokens[:, None] * 2).all()
    assert trace.rows.tolist() == [9, *[1] * 27, 9, *[1] * 27, 4, *[1] * 14] and trace.domain == "rain"
    assert np.flatnonzero(trace.after).tolist() == [0, 28, 56]
    assert trace.model == profile.model and profile.model.experts == (8,) * 4
    counted = np.zeros(profile.model.shape, dtype=int)
    for step in trace.steps():
        for layer in range(4):
            np.add.at(counted[layer], step.ids[layer].reshape(-1), 1)
    assert (counted == stats.counts.sum(axis=0)).all()
    assert np.allclose(stats.mass[0].sum(axis=1), 22, rtol=1e-3)  # weights of a token sum to one


def test_two_runs_give_the_same_profile(taken: Path, turbomoe: Turbomoe, moe: Path, text: Path) -> None:
    line = ("profile", "-m", moe, "--text", text, "--domain", "rain", "--tokens", "90", "-c", "36", "-o", taken / "q")
    assert turbomoe(*line).code == 0
    one, other = (Profile.load(taken / name).domains["rain"].arrays() for name in "pq")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_table_for_people_and_json_for_programs(turbomoe: Turbomoe, moe: Path, text: Path) -> None:
    line = ("profile", "-m", moe, "--text", text, "--tokens", "40")
    done = turbomoe(*line)
    heads, rule, row, *legend = done.out.splitlines()
    assert "effective experts" in heads and "next-gate recall" in heads and row.split("|")[1].strip() == "text"
    assert set(rule) == set("|- ") and len(heads) == len(rule) == len(row)
    names = [line.partition(":")[0] for line in legend]
    assert names == [
        "Prefill, decode", "Effective experts", "5% to 50%", "Reuse 1, 8, 32", "By chance", "Next-gate recall",
    ]  # fmt: skip
    assert "40 of" in done.err and "are run" in done.err
    found = turbomoe(*line, "--json").json
    assert found["domains"]["text"]["tokens"] == {"prefill": 10, "decode": 30} and found["layers"] == [0, 1, 2, 3]


def test_add_merges_and_without_it_the_file_is_replaced(taken: Path, turbomoe: Turbomoe, moe: Path, text: Path) -> None:
    line = ("profile", "-m", moe, "--text", text, text, "--tokens", "20", "-o", taken / "p")
    assert turbomoe(*line, "--domain", "storm", "--add").code == 0
    merged = Profile.load(taken / "p")
    assert list(merged.domains) == ["rain", "storm"] and merged.domains["storm"].tokens.sum() == 40
    assert turbomoe(*line, "--domain", "storm", "--add").code == 0
    assert Profile.load(taken / "p").domains["storm"].tokens.sum() == 80
    done = turbomoe(*line, "--domain", "storm", "--plots", taken / "plots", "--add")
    assert sorted(path.name for path in (taken / "plots").iterdir()) == [
        "coverage.png", "heat-map.png", "reuse.png", "transfer.png",
    ]  # fmt: skip
    assert done.err.count("wrote ") == 4
    assert turbomoe(*line).code == 0
    assert list(Profile.load(taken / "p").domains) == ["text"]


REFUSED = {
    "--add": ("nothing to add to", 2),
    "--domain a/b": ("cannot tag", 2),
    "--tokens 0": ("at least one token", 2),
    "--tokens 9": ("too short", 1),
    "-np 2": ("one sequence at a time", 2),
    "--moe-profile-save x": ("no use for --moe-profile-save", 2),
}


@pytest.mark.parametrize(("flags", "said"), REFUSED.items())
def test_what_makes_no_sense_is_refused(
    turbomoe: Turbomoe, moe: Path, text: Path, flags: str, said: tuple[str, int]
) -> None:
    done = turbomoe("profile", "-m", moe, "--text", text, *flags.split())
    assert said[0] in done.err and done.code == said[1]


def test_a_dense_model_has_no_experts_to_profile(turbomoe: Turbomoe, chat_model: Path, text: Path) -> None:
    for line in (("profile", "--text", text), ("run", "-p", "x", "--moe-profile-save", "p")):
        done = turbomoe(line[0], "-m", chat_model, *line[1:])
        assert done.code == 1 and "no routed experts" in done.err


def test_a_profile_of_another_model_is_not_added_to(
    taken: Path, turbomoe: Turbomoe, other_moe: Path, text: Path
) -> None:
    before = (taken / "p").read_bytes()
    done = turbomoe("profile", "-m", other_moe, "--text", text, "-o", taken / "p", "--add")
    assert done.code == 1 and "another model" in done.err and (taken / "p").read_bytes() == before


# -- profiles in other verbs ---------------------------------------------------------------------------------------


def test_a_run_starts_from_a_profile_and_adds_to_it(taken: Path, turbomoe: Turbomoe, moe: Path) -> None:
    line = ("run", "-m", moe, "-p", "rain", "-n", "6", "--temp", "0", *CACHE, "--json")
    plain = turbomoe(*line).json
    seeded = turbomoe(*line, "--moe-profile", taken / "p", "--moe-profile-save", taken / "p").json
    assert seeded["text"] == plain["text"]
    learnt = Profile.load(taken / "p")
    assert list(learnt.domains) == ["rain", "served"]
    served = learnt.domains["served"].tokens.tolist()
    assert served == [seeded["prompt_tokens"], seeded["generated_tokens"] - 1]
    assert turbomoe(*line, "--moe-profile-save", taken / "new").code == 0
    assert Profile.load(taken / "new").domains["served"].tokens.tolist() == served


def test_the_profile_reaches_the_policy(
    taken: Path, turbomoe: Turbomoe, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turbomoe.experts.residency import ResidencyPolicy

    seen: list[np.ndarray] = []
    real = ResidencyPolicy.seed_prior

    def seed(self: ResidencyPolicy, counts: np.ndarray, weight: float) -> None:
        seen.append(counts)
        real(self, counts, weight)

    monkeypatch.setattr(ResidencyPolicy, "seed_prior", seed)
    done = turbomoe("run", "-m", moe, "-p", "x", "-n", "2", *CACHE, "--moe-profile", taken / "p")
    assert done.code == 0
    assert len(seen) == 1 and np.array_equal(seen[0], Profile.load(taken / "p").prior())


def test_a_profile_without_a_cache_is_told_to_be_useless(taken: Path, turbomoe: Turbomoe, moe: Path) -> None:
    line = ("run", "-m", moe, "-p", "x", "-n", "2", "--moe-profile", taken / "p")
    done = turbomoe(*line)
    assert done.code == 0 and "--moe-profile has no effect" in done.err
    assert turbomoe(*line, "--strict").code == 1


def test_an_unusable_profile_stops_the_run_before_it_begins(
    taken: Path, turbomoe: Turbomoe, moe: Path, other_moe: Path
) -> None:
    (taken / "bad").write_bytes((taken / "p").read_bytes()[:-1])
    before = (taken / "bad").read_bytes()
    for flag in ("--moe-profile", "--moe-profile-save"):
        for path, who, said in (("bad", moe, "damaged"), ("p", other_moe, "another model")):
            done = turbomoe("run", "-m", who, "-p", "x", *CACHE, flag, taken / path)
            assert done.code == 1 and said in done.err and done.out == "", (flag, path)
    assert turbomoe("run", "-m", moe, "-p", "x", *CACHE, "--moe-profile", taken / "none").code == 1
    assert (taken / "bad").read_bytes() == before


def test_what_was_learnt_is_saved_after_ctrl_c_too(
    taken: Path, turbomoe: Turbomoe, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turbomoe.cli import run

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "statistics", interrupted)
    done = turbomoe("run", "-m", moe, "-p", "x", "-n", "4", "--moe-profile-save", taken / "late")
    assert done.code == 130 and Profile.load(taken / "late").domains["served"].tokens[1] == 3


def test_a_run_that_saw_nothing_writes_nothing(
    taken: Path, turbomoe: Turbomoe, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from turbomoe.cli import run

    def broken(*_: object) -> None:
        raise OSError("no engine today")

    monkeypatch.setattr(run, "make_engine", broken)
    done = turbomoe("run", "-m", moe, "-p", "x", "--moe-profile-save", taken / "late")
    assert done.code == 1 and "no engine today" in done.err and not (taken / "late").exists()


# -- simulate ------------------------------------------------------------------------------------------------------


def test_simulate_prints_a_table_and_json(taken: Path, turbomoe: Turbomoe) -> None:
    done = turbomoe("simulate", taken / "t", "--profile", taken / "p")
    assert done.code == 0, done.err
    heads, _, *rows, note, hits, slots = done.out.splitlines()
    assert [cell.strip() for cell in heads.strip("|").split("|")] == [
        "policy",
        "1 slots",
        "2 slots",
        "3 slots",
        "4 slots",
    ]
    names = ["lru", "lfu", "adaptive", "seeded", "static", "lru-wait", "oracle", "belady"]
    assert [row.split("|")[1].strip() for row in rows] == names
    assert hits.startswith("Hit rate: share of routed experts") and slots.startswith("Slots: ")
    assert (
        note.startswith("Hit rate / experts copied per layer and token in decode")
        and "68 decode tokens, 8 experts in 4 layers" in done.err
    )
    found = turbomoe("simulate", taken / "t", "--slots", "8,2", "--policy", "lru", "--policy", "belady", "--json").json
    assert [(r["policy"], r["slots"]) for r in found["results"]] == [
        ("lru", 2), ("lru", 8), ("belady", 2), ("belady", 8),
    ]  # fmt: skip
    assert all(r["hits"] + r["misses"] == 68 * 4 * 2 for r in found["results"]) and found["domain"] == "rain"


@pytest.mark.parametrize("verb", ["simulate", "run"])
def test_help_says_what_the_words_of_the_cache_mean(verb: str, turbomoe: Turbomoe) -> None:
    said = " ".join(turbomoe(verb, "--help").out.split())
    assert "hysteresis: how many times hotter (more used of late)" in said
    assert "a sighting (one use of an expert) counts half" in said
    if verb == "simulate":
        assert "a hit is a routed expert whose copy was there, an upload (or promotion) copies" in said


def test_simulate_without_a_profile_leaves_out_what_needs_one(taken: Path, turbomoe: Turbomoe) -> None:
    found = turbomoe("simulate", taken / "t", "--json").json["results"]
    assert {r["policy"] for r in found} == {"lru", "lfu", "adaptive", "lru-wait", "oracle", "belady"}


def test_the_numbers_of_the_adaptive_policy_matter(tmp_path: Path, turbomoe: Turbomoe) -> None:
    dice_trace(model(), 400, 1).save(tmp_path / "t")
    line = ("simulate", tmp_path / "t", "--policy", "adaptive", "--slots", "3", "--json")
    eager, calm = (turbomoe(*line, "--moe-hysteresis", h).json["results"][0]["upload_count"] for h in ("1", "3"))
    assert calm < eager
    assert turbomoe(*line, "--moe-hysteresis", "0").code == 2


def test_simulate_draws(tmp_path: Path, turbomoe: Turbomoe) -> None:
    dice_trace(model(), 400, 1).save(tmp_path / "t")
    done = turbomoe("simulate", tmp_path / "t", "--plots", tmp_path / "plots")
    assert done.code == 0 and (tmp_path / "plots" / "simulation.png").stat().st_size > 5000
    assert "after the first 256 tokens" in done.out


def test_simulate_refuses_what_it_cannot_use(taken: Path, turbomoe: Turbomoe, tmp_path: Path) -> None:
    other = model(identity="c" * 64)
    Profile(other, 32.0, {}).save(tmp_path / "foreign")
    for line, said, code in (
        ((taken / "p",), "another kind", 1),
        ((tmp_path / "nowhere",), "not there", 1),
        ((taken / "t", "--profile", tmp_path / "foreign"), "another model", 1),
        ((taken / "t", "--slots", "9"), "between 1 and 8", 2),
        ((taken / "t", "--slots", "two"), "no list of slots", 2),
        ((taken / "t", "--policy", "magic"), "no policy", 2),
        ((taken / "t", "--policy", "static"), "--profile FILE", 2),
    ):
        done = turbomoe("simulate", *line)
        assert said in done.err and done.code == code and done.out == ""


@pytest.mark.parametrize(("given", "slots"), [("16", [16]), ("32,16", [16, 32]), (" 1 , 1 ", [1])])
def test_lists_of_slots(given: str, slots: list[int]) -> None:
    assert parse_slots(given) == slots


@pytest.mark.parametrize("given", ["", ",", "1,", "-1", "1.5", "²", "9" * 30, "1 2"])
def test_what_is_no_list_of_slots(given: str) -> None:
    with pytest.raises(SettingsError, match="no list of slots"):
        parse_slots(given)


def test_output_to_a_full_disk_is_one_sentence(turbomoe: Turbomoe, moe: Path, text: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = turbomoe("profile", "-m", moe, "--text", text, "--tokens", "20", "-o", "/dev/full")
    assert done.code == 1 and "Cannot write /dev/full" in done.err and "effective experts" in done.out
