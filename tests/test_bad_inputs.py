"""What a person gets wrong before a run starts: one clear message, exit code 2, nothing written, no cluster started."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import engine
from engine.cli import FAILURE, USER_ERROR, main
from engine.config_file import load_config
from engine.plan import prepare


@dataclass
class Run:
    """A run that would work, before a case spoils it."""

    folder: Path
    raw: dict[str, Any]
    config: Path
    text: str | bytes | None = None
    """Whole configuration file, where a dict cannot say it."""
    overrides: list[str] = field(default_factory=list)

    def set(self, key: str, value: Any) -> None:
        """Set `section.key` in the configuration."""
        *sections, last = key.split(".")
        node = self.raw
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value

    def file(self, name: str, content: str | bytes) -> Path:
        """A file beside the configuration."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def rows(self, *lines: str | bytes, name: str = "bad.jsonl") -> None:
        """Train on these lines."""
        raw = [line if isinstance(line, bytes) else line.encode() for line in lines]
        self.set("data.train", str(self.file(name, b"\n".join(raw) + b"\n")))

    def source(self, code: str) -> None:
        """Train on what `rows` in this file produces."""
        self.set("data.train", f"{self.file('source.py', code)}:rows")

    def reward(self, code: str, name: str = "score") -> None:
        """Score with a function of this file."""
        self.set("rewards.functions", [f"{self.file('score.py', code)}:{name}"])

    def model(self) -> Path:
        """A copy of the model, to be spoiled."""
        copy = self.folder / "model"
        shutil.copytree(self.raw["model"]["path"], copy)
        self.set("model.path", str(copy))
        return copy

    def override(self, text: str) -> None:
        """Add an argument of the command line."""
        self.overrides.append(text)


GOOD = '{"prompt": "one", "answer": "1"}'
OK = "def score(sample):\n    return 1.0\n"


def a_list(run: Run) -> None:
    run.text = "- model\n- data\n"


def binary(run: Run) -> None:
    run.text = b"\x80\x04\x95\x00\xff"


def not_yaml(run: Run) -> None:
    run.text = "model:\n  path: [a\nrl: 1\n"


def a_key_twice(run: Run) -> None:
    run.text = yaml.safe_dump(run.raw, sort_keys=False) + "name: again\n"


def absent_config(run: Run) -> None:
    run.config = run.folder / "nowhere.yaml"


def folder_as_config(run: Run) -> None:
    run.config = run.folder


def two_mistakes(run: Run) -> None:
    run.set("rl.steps", 0)
    run.set("seed", -1)


def server_without_template(run: Run) -> None:
    model = shutil.copytree(run.raw["model"]["path"], run.folder / "judge")
    (model / "chat_template.jinja").unlink()
    run.set("rewards.servers", [{"name": "ref", "path": str(model)}])


def too_long_for_the_model(run: Run) -> None:
    run.set("rollout.max_model_len", 512)
    run.set("policy.tokens_per_microbatch", 512)


def index(run: Run, content: str) -> None:
    (run.model() / "model.safetensors.index.json").write_text(content)


def same_function_twice(run: Run) -> None:
    run.set("rewards.functions", run.raw["rewards"]["functions"] * 2)


def same_name_twice(run: Run) -> None:
    files = [run.file("one.py", OK), run.file("two.py", OK)]
    run.set("rewards.functions", [f"{file}:score" for file in files])


def existing_run(run: Run) -> None:
    folder = run.folder / "runs" / "test"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval/reward": 0.5}\n')


def file_as_output(run: Run) -> None:
    run.set("output_dir", str(run.file("taken", "")))


@dataclass(frozen=True)
class Case:
    """A mistake, and what the message must contain: the place, the mistake, the remedy."""

    name: str
    spoil: Callable[[Run], Any]
    says: tuple[str, ...]


def offline(stage: str, *lines: str | bytes, **sections: Any) -> Callable[[Run], None]:
    """An offline stage on these lines."""

    def spoil(run: Run) -> None:
        run.raw.update(stage=stage, training={"max_length": 64}, **sections)
        del run.raw["rewards"]
        run.rows(*lines)

    return spoil


SFT = '{"prompt": "one", "completion": "two"}'
PAIR = '{"prompt": "one", "chosen": "two", "rejected": "three"}'


def case(name: str, spoil: Callable[[Run], Any], *says: str) -> Case:
    """One line of the table."""
    return Case(name, spoil, says)


CASES = [
    # the configuration file
    case("config absent", absent_config, "nowhere.yaml: no such file", "give the path of a YAML"),
    case("config is a folder", folder_as_config, "is a folder", "give the path of a YAML file"),
    case("config is not YAML", not_yaml, "run.yaml:3: is not valid YAML", "expected"),
    case("config is a list", a_list, "run.yaml: must be a mapping of sections (model:, data:"),
    case("config is binary", binary, "run.yaml: is not text", "give the path of a YAML file"),
    case("key given twice", a_key_twice, "run.yaml:", "key 'name' is given twice", "keep one"),
    case("unknown key", lambda r: r.set("rl.step", 3), "run.yaml: rl.step: unknown key", "did you mean 'steps'?"),
    case("unknown section", lambda r: r.set("rollouts.engines", 1), "rollouts: unknown key", "mean 'rollout'?"),
    case("unknown override", lambda r: r.override("rl.stesp=3"), "rl.stesp: unknown key", "did you mean 'steps'?"),
    case("malformed override", lambda r: r.override("rl.steps"), "override 'rl.steps'", "like section.key=value"),
    case("override below a value", lambda r: r.override("name.x=1"), "override 'name.x=1'", "not a section"),
    case("override is no YAML", lambda r: r.override("name=[1"), "override 'name=[1'", "not valid YAML; quote it"),
    case("wrong type", lambda r: r.set("rl.steps", "many"), "rl.steps: ", "valid integer", "got 'many'"),
    case("negative size", lambda r: r.set("rl.steps", -3), "rl.steps: ", "greater than or equal to 1", "got -3"),
    case("unknown choice", lambda r: r.set("policy.zero_stage", 5), "policy.zero_stage: ", "0, 1, 2 or 3", "got 5"),
    case("object store too small", lambda r: r.set("ray.object_store_gib", 0.05), "ray.object_store_gib: ", "0.1"),
    case("KL without a gradient", lambda r: r.set("algorithm", {"kl_coef": 0.1, "kl_estimator": "k1"}),
         "kl_estimator: ", "use k2 or k3"),
    case("unknown algorithm", lambda r: r.set("algorithm", "gppo"), "no algorithm is called 'gppo'", "'ppo'?"),
    case("no such estimator", lambda r: r.set("algorithm.advantage", "gea"), "advantage: 'gea' is none of gae"),
    case("own loss not found", lambda r: r.set("algorithm.loss", "nowhere.py:f"), "algorithm.loss", "no such file"),
    case("a loss on pairs without pairs", lambda r: r.set("algorithm.loss", "preference"), "go together"),
    case("groups without sharing", lambda r: r.set("placement.groups", [["policy", "rollout"]]), "placement.groups: "),
    case("no reward model there", lambda r: r.set("rewards.models", [str(r.folder)]), "rewards.models.0.path: ",
         "has no reward_model.json"),
    case("unknown server",
         lambda r: r.set("rewards.functions", [{"function": "judge", "arguments": {"server": "ref"}}]),
         "server 'ref' is none of rewards.servers (empty)"),
    case("a server named twice", lambda r: r.set("rewards.servers", [{"name": "ref", "path": "m"}] * 2),
         "rewards.servers: two have the same name"),
    case("a server without a chat template", server_without_template, "rewards.servers.0.path: ", "no chat template"),
    case("NaN", lambda r: r.set("optimizer.learning_rate", float("nan")), "optimizer.learning_rate: ", "got nan"),
    case("required section missing", lambda r: r.raw.pop("data"), "run.yaml: data: is required", "Rows"),
    case("two mistakes", two_mistakes, "rl.steps: ", "got 0", "seed: ", "got -1"),
    case("bad run name", lambda r: r.set("name", "a/b"), "name: ", "match pattern", "got 'a/b'"),
    # sizes that do not go together
    case("group of one", lambda r: r.set("rl.samples_per_prompt", 1), "rl.samples_per_prompt: ", "set it to 2"),
    case("greedy training", lambda r: r.set("rollout.temperature", 0), "rollout.temperature: ", "use 1.0"),
    case("no room for a prompt", lambda r: r.set("rollout.max_new_tokens", 64), "max_new_tokens: 64", "lower it"),
    case("prompt limit too long", lambda r: r.set("data.max_prompt_tokens", 60), "data.max_prompt_tokens: ", "lower"),
    case("micro-batch too small", lambda r: r.set("policy.tokens_per_microbatch", 32), "per_microbatch: 32", "raise"),
    case("too many minibatches", lambda r: r.set("rl.minibatches_per_step", 5), "rl.minibatches_per_step: 5", "use"),
    case("nothing to evaluate", lambda r: r.set("data.evaluation", None) or r.set("evaluation.every", 1),
         "evaluation.every: ", "set data.evaluation or evaluation.every=0"),
    # rows
    case("rows absent", lambda r: r.set("data.train", "nowhere.jsonl"), "'nowhere.jsonl': no such file", "start at"),
    case("no rows", lambda r: r.rows(""), "bad.jsonl", "no usable rows: it is empty", "give it at least one"),
    case("row is not JSON", lambda r: r.rows(GOOD, "{oops"), "bad.jsonl:2: not valid JSON", "on_bad_row: skip"),
    case("row is no object", lambda r: r.rows(GOOD, "[1]"), "bad.jsonl:2: must be an object", "is a list"),
    case("row is not UTF-8", lambda r: r.rows(GOOD, b'{"prompt": "\xff"}'), "bad.jsonl:2: not UTF-8", "mend them"),
    case("no prompt column", lambda r: r.rows('{"question": "one", "answer": "1"}'), "bad.jsonl:1: has no column",
         "its columns: question, answer", "data.columns: {prompt: ...}"),
    case("renamed column absent", lambda r: r.set("data.columns", {"prompt": "question"}), "rows.jsonl:1: ",
         "no column 'question'", "its columns: prompt, answer"),
    case("empty prompt", lambda r: r.rows(GOOD, '{"prompt": " "}'), "bad.jsonl:2: column 'prompt' is empty"),
    case("answer as last message", lambda r: r.rows('{"prompt": [{"role": "assistant", "content": "1"}]}'),
         "bad.jsonl:1: ", "end with the one to be answered"),
    case("prompt too long", lambda r: r.rows(GOOD, json.dumps({"prompt": "a b c " * 200})), "jsonl:2: the prompt has",
         "the limit is 56", "raise data.max_prompt_tokens", "data.on_long_row: skip"),
    case("prompt too long to be cut", lambda r: r.rows(json.dumps({"prompt": "a b c " * 200})) or r.set(
         "data.on_long_row", "truncate"), "cut into the chat template", "shorten them", "bad.jsonl:1: "),
    case("cells missing", lambda r: r.rows("prompt,answer", "one", name="bad.csv"), "bad.csv:2: has 1 cells"),
    case("not parquet", lambda r: r.rows("x", name="bad.parquet"), "bad.parquet: not a valid parquet file"),
    case("unknown kind of file", lambda r: r.rows(GOOD, name="rows.xls"), "rows.xls': unknown kind", ".jsonl"),
    case("source raises", lambda r: r.source("def rows():\n    raise KeyError('k')\n"),
         "source.py:rows': raised KeyError", "source.py:2)"),
    case("source is no function", lambda r: r.source("rows = [1]\n"), "source.py:rows': is a list, not a function"),
    case("source returns junk", lambda r: r.source("def rows():\n    return 3\n"), "returned a number",
         "must return an iterable of dicts"),
    case("source yields junk", lambda r: r.source("def rows():\n    yield 3\n"),
         "source.py:rows: row 1: must be an object"),
    case("unknown dataset", lambda r: r.set("data.train", "nobody/nothing-of-this-name"),
         "'nobody/nothing-of-this-name'", "check the name, subset and split and the network, or give a file"),
    # the model
    case("model folder absent", lambda r: r.set("model.path", str(r.folder / "nowhere")), "model.path: ",
         "nowhere: no such folder", "give a folder in Hugging Face format or a Hub name"),
    case("unknown Hub name", lambda r: r.set("model.path", "nobody/nothing"),
         "model.path: nobody/nothing: no such folder, and no tokenizer could be loaded from the Hub under that name",
         "give an existing folder", "or check the Hub name's spelling and the network"),
    case("model folder not made yet", lambda r: r.set("model.path", "models-of-nobody/SmolLM2-135M-Instruct"),
         "SmolLM2-135M-Instruct: no such folder, and no tokenizer", "paths start at the working directory"),
    case("no config.json", lambda r: (r.model() / "config.json").unlink(), "has no config.json", "Hugging Face format"),
    case("config.json is junk", lambda r: (r.model() / "config.json").write_text("[]"), "is not a JSON object", "save"),
    case("no weights", lambda r: (r.model() / "model.safetensors").unlink(), "holds no *.safetensors",
         "save_pretrained"),
    case("weights are a stub", lambda r: (r.model() / "model.safetensors").write_text("version https://git-lfs"),
         "model.safetensors is no whole safetensors file", "download"),
    case("index of weights is cut off", lambda r: index(r, '{"weight_map": {"a": "mod'), "index.json is no whole index",
         "download or save the model again"),
    case("index of weights is a list", lambda r: index(r, '["model.safetensors"]'), "index.json is no whole index"),
    case("index of weights has no map", lambda r: index(r, '{"metadata": {}}'), "index.json is no whole index"),
    case("map of weights is a list", lambda r: index(r, '{"weight_map": ["a"]}'), "index.json is no whole index"),
    case("index of weights names no file", lambda r: index(r, '{"weight_map": {"a": 3}}'), "is no whole safetensors"),
    case("tokenizer is junk", lambda r: (r.model() / "tokenizer.json").write_text("{"), "model.path: ", "no tokenizer",
         "check the folder's tokenizer files"),
    case("context too short", too_long_for_the_model, "rollout.max_model_len: 512", "256 tokens", "lower it"),
    case("no chat template", lambda r: (r.model() / "chat_template.jinja").unlink() or r.set("data.system_prompt",
         "Hi"), "data.system_prompt: needs a chat template", "put the text into the prompts"),
    # rewards
    case("reward file absent", lambda r: r.set("rewards.functions", ["nowhere.py:f"]), "'nowhere.py:f': no such file",
         "relative path starts at the working directory"),
    case("reward without a function", lambda r: r.set("rewards.functions", ["nowhere.py"]), "path/file.py:function"),
    case("environment misspelt", lambda r: r.set("environment", "tool"), "environment.path: 'tool' must be pkg.mod"),
    case("environment without a reply",
         lambda r: r.set("environment", str(r.file("game.py", "class Game: reset = print")) + ":Game"),
         "has no method 'step'"),
    case("environment in another stage", lambda r: [r.set("environment", "tools"), r.set("stage", "sft")],
         "environment: episodes are for stage: rl, not sft"),
    case("tools that are none",
         lambda r: r.set("environment", {"path": "tools", "arguments": {"tools": []}}), "tools is empty"),
    case("reward misspelt", lambda r: r.set("rewards.functions", ["numric"]), "did you mean 'numeric'?"),
    case("reward with wrong arguments",
         lambda r: r.set("rewards.functions", [{"function": "numeric", "arguments": {"colum": "a"}}]),
         "reward function 'numeric': arguments: got an unexpected keyword argument 'colum'"),
    case("reward with a bad argument",
         lambda r: r.set("rewards.functions", [{"function": "numeric", "arguments": {"tolerance": -1}}]), "tolerance"),
    case("steps that no function cuts", lambda r: r.set("rewards.steps", "score.py:cut"), "score.py"),
    case("steps of a model that nothing says the end of",
         lambda r: r.set("rewards.models", [{"path": "m", "steps": "each"}]), "steps: each needs rewards.steps"),
    case("groups of one cannot be normalised",
         lambda r: [r.set("rewards.normalize", "group"), r.set("rl.samples_per_prompt", 1),
                    r.set("algorithm", "reinforce_pp")],
         "rewards.normalize: group compares"),
    case("reward not found", lambda r: r.reward(OK, "scores"), "score.py:scores'", "did you mean 'score'?"),
    case("reward is no function", lambda r: r.reward("score = 1.0\n"), "score.py:score': is a float, not a function"),
    case("reward has a syntax error", lambda r: r.reward("def score(:\n"), "score.py failed: SyntaxError",
         "score.py:1)"),
    case("reward fails to import", lambda r: r.reward("import nowhere_at_all\n" + OK), "No module named",
         "score.py:1)"),
    case("reward takes something else", lambda r: r.reward("def score(a, b):\n    return 1.0\n"), "f(sample)",
         "(a, b)"),
    case("same reward twice", same_function_twice, "rewards: ", "same name", "give each its own `name`"),
    case("two rewards of one name", same_name_twice, "rewards: ", "named 'score'", "its own name"),
    case("no reward", lambda r: r.set("rewards.functions", []), "rewards.functions: is required", "at least one"),
    # rows of the offline stages
    case("sft: missing column", offline("sft", SFT, '{"prompt": "one"}'), "bad.jsonl:2: ", "'completion'",
         "on_bad_row: skip"),
    case("sft: empty answer", offline("sft", '{"prompt": "one", "completion": " "}'), "jsonl:1: ", "'completion'",
         "empty"),
    case("sft: not UTF-8", offline("sft", SFT, b'{"prompt": "\xff", "completion": "x"}'), "jsonl:2: not UTF-8"),
    case("sft: over-long", offline("sft", json.dumps({"prompt": "one", "completion": "a b c " * 99})), "jsonl:1: ",
         "the limit is 64", "training.max_length"),
    case("sft: nobody answers", offline("sft", '{"messages": [{"role": "user", "content": "hi"}]}'), "jsonl:1: ",
         "assistant"),
    case("preference: nothing preferred", offline("preference", '{"prompt": "one", "chosen": "a", "rejected": "a"}'),
         "jsonl:1: ", "are the same"),
    case("preference: empty rejected", offline("preference", PAIR, '{"prompt": "a", "chosen": "b", "rejected": ""}'),
         "jsonl:2: ", "'rejected'", "empty"),
    case("preference: missing chosen", offline("preference", '{"prompt": "one", "rejected": "a"}'), "jsonl:1: ",
         "'chosen'", "missing"),
    case("kto: no label", offline("preference", '{"prompt": "one", "completion": "a"}', preference={"loss": "kto"}),
         "jsonl:1: ", "'label'"),
    case("rankings: all equal", offline("reward_model", '{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 1]}',
         reward_model={"kind": "ranking"}), "jsonl:1: ", "same rank"),
    case("steps: a label too few", offline("reward_model", '{"prompt": "a", "steps": ["b", "c"], "labels": [true]}',
         reward_model={"kind": "process"}), "jsonl:1: ", "1 labels for 2 steps"),
    case("heads without annotators", offline("reward_model", PAIR, reward_model={"annotator_heads": True}),
         "reward_model.annotator_heads: ", "'annotator'"),
    case("pretrain: empty text", offline("pretrain", '{"text": "  "}'), "jsonl:1: ", "'text'", "empty"),
    case("pretrain: no architecture", offline("pretrain", '{"text": "a b"}', model={"new": {"architecture": {}}}),
         "model.new.architecture: model_type is required"),
    case("pretrain: strange architecture", offline("pretrain", '{"text": "a b"}',
         model={"new": {"architecture": {"model_type": "lama"}}}), "model.new.architecture: ", "lama"),
    case("distill: teacher speaks otherwise", offline("distill", '{"prompt": "a"}', distill={"teacher": "nowhere/x"}),
         "distill.teacher: nowhere/x"),
    # where the records go
    case("name taken", existing_run, "runs/test already holds a run", "choose another name= or delete it"),
    case("output_dir is a file", file_as_output, "taken/test: cannot make the run's folder", "another output_dir="),
    case("output_dir not writable", lambda r: r.set("output_dir", "/proc/runs"), "/proc/runs/test: cannot make",
         "choose"),
    case("wandb without a key", lambda r: r.set("tracking.wandb", "online"), "tracking.wandb: online", "wandb login",
         "tracking.wandb=offline"),
]  # fmt: skip


@pytest.fixture
def run(raw_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose interpreter state is its own: no key of a person, no import paths of other cases."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return Run(tmp_path, raw_config, tmp_path / "run.yaml")


@pytest.fixture
def without_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on to the cluster, and so to Ray, gets an ImportError instead of one that other tests started."""
    monkeypatch.delattr(engine, "cluster", raising=False)
    monkeypatch.setitem(sys.modules, "engine.cluster", None)


def files(folder: Path) -> dict[Path, bytes]:
    """Every file and folder below, with its content; not the home folder, where libraries keep caches."""
    found = [p for p in folder.rglob("*") if folder / "home" not in (p, *p.parents)]
    return {path: path.read_bytes() if path.is_file() else b"" for path in found}


@pytest.mark.usefixtures("without_cluster")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_is_told_clearly_before_anything_starts_and_leaves_nothing_behind(
    case: Case, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case.spoil(run)
    content = run.text if run.text is not None else yaml.safe_dump(run.raw, sort_keys=False)
    run.file("run.yaml", content)
    before = files(run.folder)
    monkeypatch.setattr(sys, "argv", ["gnomon", "run", str(run.config), *run.overrides])

    with pytest.raises(SystemExit) as end:
        main()

    output = capsys.readouterr()
    assert end.value.code == USER_ERROR
    assert [line[:7] for line in output.err.splitlines()].count("error: ") == 1
    assert "Traceback" not in output.err + output.out
    for part in case.says:
        assert part in output.err
    assert files(run.folder) == before


def test_the_run_that_the_cases_spoil_is_itself_accepted_and_goes_on_to_the_cluster(
    run: Run, without_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.file("run.yaml", yaml.safe_dump(run.raw))
    monkeypatch.setattr(sys, "argv", ["gnomon", "run", str(run.config)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == FAILURE
    assert "failed: import of engine.cluster halted" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run.folder))
    model = run.model()
    run.set("output_dir", "~/runs")
    run.set("model.path", "~/model")
    run.set("data.train", "~/rows.jsonl")
    run.set("data.evaluation", {"path": "~/*.jsonl"})
    run.set("rewards.functions", ["~/my_rewards.py:share_of_e"])
    config = load_config(run.file("run.yaml", yaml.safe_dump(run.raw)))
    assert config.run_dir == run.folder / "runs" / "test"
    assert config.model.path == str(model)
    assert config.rewards.functions[0].function == f"{run.folder}/my_rewards.py:share_of_e"
    assert len(prepare(config).train_prompts) == 8


@pytest.mark.parametrize("arguments", [[], ["run"], ["rnu"], ["run", "x.yaml", "--steps", "3"]])
def test_a_command_that_is_mistyped_is_a_usage_error(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gnomon", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    output = capsys.readouterr()
    assert end.value.code == 2
    assert "Usage:" in output.err + output.out
    assert "Traceback" not in output.err
