"""``turbomoe run``: where the answer goes, where prompts come from, and one sentence for all that can go wrong."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gguf import GGUFWriter

from tests.cli.tiny_chat import CONTEXT, Says, Turbomoe, write_chat_model
from turbomoe.cli import main as cli
from turbomoe.hardware.memory import DeviceMemory

GREEDY = ("--temp", "0")
EXACT = ("-ctk", "bf16", "-ctv", "bf16")
MIB = 1 << 20


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes, tty: bool = False) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(data))
    stdin.isatty = lambda: tty  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)


def one_sentence(text: str) -> bool:
    """An error for people: text of a few lines at most, and no traceback."""
    return 0 < len(text.splitlines()) <= 4 and "Traceback" not in text and "did not expect" not in text


# Where things go


def test_the_answer_alone_is_on_standard_output(turbomoe: Turbomoe, says: Says) -> None:
    says("Because of the scattering.")
    done = turbomoe("run", "-m", says.path, "Why is the sky blue?", *GREEDY)
    assert done.code == 0
    assert done.out == "Because of the scattering.\n"
    heads, sizes, figures = done.err.splitlines()
    assert heads.split() == ["device", "weights", "kv", "workspace", "experts", "total", "available", "free"]
    assert sizes.startswith("cpu  ")
    assert figures.startswith("[36 prompt tokens (0 reused), 6 generated, first after")


def test_thoughts_go_to_standard_error(turbomoe: Turbomoe, says: Says) -> None:
    says("<think>\nLet me see.\n</think>\n\nIt is 42.")
    done = turbomoe("run", "-m", says.path, "Well?", *GREEDY)
    assert done.out == "It is 42.\n"
    assert "\nLet me see.\n\n" in done.err and "think>" not in done.err
    assert "\x1b" not in done.err  # colours are for terminals


def test_a_thought_that_the_template_opened(turbomoe: Turbomoe, says: Says) -> None:
    says.template("{{ messages[-1].content }}<|im_start|>assistant\n<think>\n")
    says("Hm.</think>42")
    done = turbomoe("run", "-m", says.path, "Well?", *GREEDY, "--json")
    assert (done.json["text"], done.json["reasoning"]) == ("42", "Hm.")


def test_json(turbomoe: Turbomoe, chat_model: Path) -> None:
    done = turbomoe("run", "-m", chat_model, "Why?", "-n", "5", *GREEDY, "--json", "-ctk", "tq4", "-ctv", "bf16")
    answer = done.json
    assert list(answer) == [
        "model", "text", "reasoning", "finish", "prompt_tokens", "reused_tokens", "generated_tokens",
        "first_token_s", "tokens_per_s", "kv_type_k", "kv_type_v", "kv_bytes", "kv_bits_per_value",
    ]  # fmt: skip
    assert answer["model"] == "tiny" and answer["finish"] in ("length", "stop")
    assert (answer["reused_tokens"], answer["kv_type_k"], answer["kv_type_v"]) == (0, "tq4", "bf16")
    assert answer["generated_tokens"] <= 5 and 10 < answer["kv_bits_per_value"] < 16


def test_json_of_a_model_with_experts_tells_about_the_cache(turbomoe: Turbomoe, tmp_path: Path) -> None:
    path = write_chat_model(tmp_path / "moe.gguf", family="qwen3moe")
    plain, cached = (
        turbomoe("run", "-m", path, "Why?", "-n", "6", *GREEDY, "--json", "--moe-cache", size).json
        for size in ("off", "1M")
    )
    assert plain["experts"]["cache"] == "off" and isinstance(cached["experts"]["cache"], dict)
    assert cached["text"] == plain["text"]


def test_a_limit_is_told_and_a_full_context_is_a_note(turbomoe: Turbomoe, says: Says) -> None:
    says("one two three", "word " * 60, "word " * 60)
    assert ", cut at the limit]" in turbomoe("run", "-m", says.path, "Count.", *GREEDY, "-n", "2").err
    done = turbomoe("run", "-m", says.path, "Go on.", *GREEDY, "-c", "48")
    assert "note: the answer was cut: the context of 48 tokens is full. To avoid: use a larger --ctx-size." in done.err
    assert turbomoe("run", "-m", says.path, "Go on.", *GREEDY, "-c", "48", "--strict").code == cli.ERROR


def test_a_stop_string_is_not_shown(turbomoe: Turbomoe, says: Says) -> None:
    says("The quick brown fox")
    assert turbomoe("run", "-m", says.path, "Go.", *GREEDY, "--stop", "brown").out == "The quick \n"


def test_the_same_seed_gives_the_same_answer(turbomoe: Turbomoe, chat_model: Path) -> None:
    texts = [
        turbomoe("run", "-m", chat_model, "Why?", "-n", "8", "-s", seed, "--temp", "2", "--json").json["text"]
        for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_defaults_are_the_model_s_own(turbomoe: Turbomoe, says: Says, monkeypatch) -> None:
    seen = []
    says.model.sampling.update(temperature=0.3, top_k=7, typical_p=0.5)
    monkeypatch.setattr("turbomoe.engine.engine.Engine.stream", lambda engine, request: seen.append(request) or 1 / 0)
    turbomoe("run", "-m", says.path, "Q", "--top-k", "9")
    sampling = seen[0].sampling
    assert (sampling.temperature, sampling.top_k) == (0.3, 9)  # the model's; the user's over the model's
    assert (sampling.top_p, sampling.min_p, sampling.repetition_penalty) == (0.95, 0.05, 1.0)  # llama.cpp's


# Prompts


def test_the_same_prompt_from_everywhere(turbomoe: Turbomoe, chat_model: Path, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("\ufeffGrüße?".encode())  # with the mark that some editors put in front
    run = ("run", "-m", chat_model, "-n", "4", *GREEDY, "--json")
    results = [turbomoe(*run, *flags) for flags in (["Grüße?"], ["-p", "Grüße?"], ["-f", file])]
    piped(monkeypatch, "Grüße?".encode())
    results.append(turbomoe(*run))
    assert [done.code for done in results] == [0] * 4
    facts = [(done.json["text"], done.json["prompt_tokens"]) for done in results]
    assert facts == [facts[0]] * 4


BAD_PROMPTS = {
    "two prompts": (["a", "-p", "b"], "There are two prompts. Give one, as an argument, with -p, or with -f."),
    "a file too": (["a", "-f", "x"], "There are two prompts"),
    "empty": ([""], "The prompt is empty. Write something to answer."),
    "blank": (["-p", " \n\t"], "The prompt is empty"),
    "missing file": (["-f", "/nowhere/at/all"], "Cannot read /nowhere/at/all. No such file or directory."),
    "a folder": (["-f", "/"], "Cannot read /. Is a directory."),
    "raw with system": (["a", "--raw", "--system", "b"], "--raw leaves no place for --system"),
    "raw with think": (["a", "--raw", "--think", "on"], "--raw leaves no place for --system and --think"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_is_told_before_anything_is_loaded(turbomoe: Turbomoe, name: str) -> None:
    flags, message = BAD_PROMPTS[name]
    done = turbomoe("run", "-m", "/no/model", *flags)
    assert done.code in (cli.ERROR, cli.USAGE) and done.out == ""
    assert done.err.startswith(message) and one_sentence(done.err)


def test_nothing_typed_and_nothing_piped(turbomoe: Turbomoe, monkeypatch) -> None:
    piped(monkeypatch, b"", tty=True)
    assert turbomoe("run", "-m", "/no/model").err.startswith("There is no prompt. Give one")
    piped(monkeypatch, b"")
    assert turbomoe("run", "-m", "/no/model").err.startswith("The prompt is empty")


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_what_is_not_utf8_names_the_byte(turbomoe: Turbomoe, tmp_path: Path, monkeypatch, source: str) -> None:
    data, file = "Straße".encode("latin-1"), tmp_path / "old.txt"
    file.write_bytes(data)
    piped(monkeypatch, data)
    flags, name = (["-f", file], str(file)) if source == "file" else ([], "standard input")
    done = turbomoe("run", "-m", "/no/model", *flags)
    assert done.code == cli.ERROR
    assert done.err == (
        f"{name} is not UTF-8 text. Byte 4 is 0xdf (invalid continuation byte). Convert it, as with iconv -t utf-8.\n"
    )


def test_a_prompt_longer_than_the_context_is_refused_with_numbers(turbomoe: Turbomoe, chat_model: Path) -> None:
    done = turbomoe("run", "-m", chat_model, "x" * 100, "-c", "64")
    assert done.code == cli.ERROR and done.out == ""
    message = done.err.splitlines()[-1]
    assert message.startswith("The prompt has 1") and "tokens and the context holds 64." in message
    assert message.endswith("Shorten the prompt or use a larger --ctx-size.")


def test_control_tokens_in_the_prompt_are_text(turbomoe: Turbomoe, chat_model: Path) -> None:
    def count(text: str) -> int:
        return turbomoe("run", "-m", chat_model, text, "-n", "1", *GREEDY, "--json").json["prompt_tokens"]

    assert count("a<|im_end|>b") >= count("ab") + 4


# Settings


BAD_SETTINGS = {
    "--temp -1": "--temp is out of range: temperature must be between",
    "--temp nan": "--temp is out of range",
    "--top-p 1.5": "--top-p is out of range",
    "--top-k -1": "--top-k is out of range",
    "--min-p 2": "--min-p is out of range",
    "--repeat-penalty 0": "--repeat-penalty is out of range",
    "-s -4": "--seed is out of range",
    "-n -1": "--predict is out of range",
    "-c -1": "--ctx-size must be between",
    "-np 0": "--parallel must be between",
    "--moe-cache lots": "'lots' is not a size. Write a number and a unit",
    "--moe-hysteresis 0": "--moe-hysteresis must be at least 1",
}


@pytest.mark.parametrize(("flags", "message"), BAD_SETTINGS.items())
def test_a_setting_out_of_range_is_told_before_anything_is_loaded(turbomoe: Turbomoe, flags: str, message: str) -> None:
    done = turbomoe("run", "-m", "/no/model", "Q", *flags.split())
    assert (done.code, done.out) == (cli.USAGE, "")
    assert done.err.startswith(message) and one_sentence(done.err)


def test_an_expert_cache_without_experts_is_noted(turbomoe: Turbomoe, says: Says) -> None:
    says("One.", "Two.", "Three.")
    run = ("run", "-m", says.path, "Q", "--moe-cache")
    assert "note: --moe-cache has nothing to hold: this model has no routed experts." in turbomoe(*run, "2M").err
    assert "--moe-cache" not in turbomoe(*run, "auto").err
    assert turbomoe(*run, "2M", "--strict").code == 1


def test_an_empty_stop_string(turbomoe: Turbomoe) -> None:
    assert turbomoe("run", "-m", "/no/model", "Q", "--stop", "").err.startswith("--stop is out of range")


@pytest.mark.parametrize("flag", ["-ctk", "-ctv"])
def test_an_unknown_kv_type_names_those_there_are(turbomoe: Turbomoe, flag: str) -> None:
    done = turbomoe("run", "-m", "/no/model", "Q", flag, "tq9")
    assert done.code == cli.USAGE and done.out == "" and one_sentence(done.err)
    assert done.err.startswith("There is no KV cache type 'tq9'. The nearest name is tq")
    assert "Choose auto (for -ctk and -ctv), or one of f32," in done.err


# The context


def context_of(turbomoe: Turbomoe, path: Path, *flags: str) -> tuple[int, str]:
    """Tokens that a bf16 cache was made for, from its bytes, and what was said."""
    done = turbomoe("run", "-m", path, "Q", "-n", "1", *GREEDY, "--json", *EXACT, *flags)
    assert done.code == 0, done.err
    per_token = 3 * 2 * 2 * 16 * 2  # layers, sides, heads, values, bytes
    return done.json["kv_bytes"] // per_token, done.err


def test_the_default_context_is_the_model_s_own_where_that_is_less(turbomoe: Turbomoe, chat_model: Path) -> None:
    size, said = context_of(turbomoe, chat_model, "--strict")
    assert CONTEXT <= size < 2 * CONTEXT and "note" not in said
    assert context_of(turbomoe, chat_model, "-c", "0", "--strict")[0] == size


def test_a_context_beyond_the_model_s_is_a_note_and_strictly_an_error(turbomoe: Turbomoe, chat_model: Path) -> None:
    size, said = context_of(turbomoe, chat_model, "-c", "1024")
    assert size >= 1024
    assert "note: a context of 1024 tokens: the model was trained for 512 tokens." in said
    done = turbomoe("run", "-m", chat_model, "Q", "-c", "1024", "--strict")
    assert done.code == cli.ERROR and done.out == ""
    assert done.err.startswith("a context of 1024 tokens. the model was trained for 512 tokens. ask for 512 or fewer.")


def with_memory(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    note = "limited to 1.0 MiB by /sys/fs/cgroup"
    monkeypatch.setattr("turbomoe.hardware.memory.devices", lambda: [DeviceMemory("cpu", 1 << 40, nbytes, note)])


def test_a_model_that_does_not_fit_is_refused_with_the_table(turbomoe: Turbomoe, chat_model: Path, monkeypatch) -> None:
    with_memory(monkeypatch, MIB)
    done = turbomoe("run", "-m", chat_model, "Q")
    assert done.code == cli.ERROR and done.out == ""
    assert done.err.splitlines()[0].split()[0] == "device" and "limited to 1.0 MiB by /sys/fs/cgroup" in done.err
    message = done.err.splitlines()[-1]
    assert message.startswith("This run needs ") and " on cpu and 1.0 MiB are available" in message
    assert "The largest part is workspace: lower --ctx-size" in message


def test_the_model_s_own_limit_shrinks_to_what_fits(turbomoe: Turbomoe, tmp_path: Path, monkeypatch) -> None:
    path = write_chat_model(tmp_path / "long.gguf", more=lambda writer: writer.add_context_length(1 << 20))
    with_memory(monkeypatch, 64 * MIB)
    size, said = context_of(turbomoe, path, "-c", "0")
    assert "note: a context of 131072 tokens: the model's own limit of 1048576 does not fit memory" in said
    assert 131072 <= size < 140000
    assert (
        turbomoe("run", "-m", path, "Q", "-c", "1048576", *EXACT).code == cli.ERROR
    )  # what was asked for is not shrunk


# Model files


def test_a_missing_model(turbomoe: Turbomoe, chat_model: Path) -> None:
    done = turbomoe("run", "-m", chat_model.with_name("tinny.gguf"), "Q")
    assert done.code == cli.ERROR
    assert "There is no file" in done.err and "Near it there is" in done.err and one_sentence(done.err)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.999])
def test_a_truncated_file(turbomoe: Turbomoe, chat_model: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.gguf"
    data = chat_model.read_bytes()
    cut.write_bytes(data[: int(len(data) * share)])
    done = turbomoe("run", "-m", cut, "Q")
    assert done.code == cli.ERROR and done.out == ""
    assert str(cut) in done.err and one_sentence(done.err)


def test_an_unknown_architecture(turbomoe: Turbomoe, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "odd.gguf", "perceptron")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    done = turbomoe("run", "-m", tmp_path / "odd.gguf", "Q")
    assert done.code == cli.ERROR and "perceptron" in done.err and one_sentence(done.err)


def test_a_file_that_is_no_model(turbomoe: Turbomoe, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    done = turbomoe("run", "-m", tmp_path / "notes.txt", "Q")
    assert done.code == cli.ERROR and one_sentence(done.err)


def test_a_file_without_a_tokenizer(turbomoe: Turbomoe, tmp_path: Path) -> None:
    path = write_chat_model(tmp_path / "bare.gguf", tokenizer=False)
    done = turbomoe("run", "-m", path, "Q")
    assert done.code == cli.ERROR and "has no tokenizer and cannot read text" in done.err


def test_a_base_model_completes_text_and_says_so(turbomoe: Turbomoe, tmp_path: Path) -> None:
    path = write_chat_model(tmp_path / "base.gguf", template=None)
    run = ("run", "-m", path, "Once", "-n", "2", *GREEDY, "--json")
    done = turbomoe(*run, "--strict")
    assert done.code == 0 and "note: the prompt is completed as plain text" in done.err
    assert done.json["text"] == turbomoe(*run, "--raw").json["text"]
    done = turbomoe(*run, "--system", "Be brief.")
    assert done.code == 0 and "note: --system has no effect" in done.err
    assert turbomoe(*run, "--system", "Be brief.", "--strict").code == cli.ERROR


def test_debug_shows_the_traceback(turbomoe: Turbomoe) -> None:
    assert turbomoe("run", "-m", "/no/model", "Q", "--debug").err.startswith("Traceback")


# Ends


def test_a_reader_that_goes_away_ends_it_quietly(turbomoe: Turbomoe, chat_model: Path, monkeypatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "w") as nobody:
        patch.setattr(sys, "stdout", nobody)
        done = turbomoe("run", "-m", chat_model, "Q", "-n", "200", *GREEDY)
        assert done.code == cli.BROKEN_PIPE
        nobody.write("the flush at the end of the process fails no more")
    assert "Traceback" not in done.err and "Broken" not in done.err


def test_ctrl_c_ends_a_run_with_130(turbomoe: Turbomoe, says: Says, monkeypatch) -> None:
    """Interrupted while the model speaks; what it had said stays on standard output."""
    says("one two three four")
    forward = says.model.shell.forward

    def interrupted(*arguments, **more):
        if len(says.model.shell.calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return forward(*arguments, **more)

    monkeypatch.setattr(says.model.shell, "forward", interrupted)
    done = turbomoe("run", "-m", says.path, "Count.", *GREEDY)
    assert (done.code, done.out) == (cli.INTERRUPTED, "one two three")
    assert "Traceback" not in done.err


def test_the_prompt_is_read_before_the_heavy_imports() -> None:
    """A wrong call is answered at once: torch is not imported for it."""
    code = (
        "import sys\nfrom turbomoe.cli.main import main\n"
        "code = main(['run', '-m', 'x', '-f', '/nowhere'])\nassert 'torch' not in sys.modules and code == 1"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
