"""A run under a control, from the config to the report."""

import json

import controlled  # noqa: F401  (texts of tokens)
import pytest

from jaxrl_llm import cli
from jaxrl_llm.metrics.json_lines import read_jsonl

CONFIG = {
    "steps": 2,
    "task": {"kind": "arithmetic", "terms": 2, "held_out": 8},
    "model": {"vocab_size": 16, "layers": 1, "d_model": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_mlp": 64},
    "mesh": {"fsdp": -1},
    "rollout": {
        "prompts": 8, "samples": 4, "max_new_tokens": 8,
        "control": {"kind": "budget", "tokens": 3, "close": ">", "closing": "+>",
                    "then": {"kind": "regex", "pattern": "[0-9]{1,2}#"}},
    },
    "reward": "exact_match",
    "metrics": {"rollouts_every": 1, "rollout_groups": -1, "tensorboard": False},
}  # fmt: skip


@pytest.mark.slow
def test_a_run_records_what_was_allowed_and_forced(tmp_path, caplog):
    (tmp_path / "run.yaml").write_text(json.dumps(CONFIG | {"run_dir": str(tmp_path / "run")}))
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    assert any(text.startswith("rollout.control: eval/exact is 0 where") for text in caplog.messages)
    rows = read_jsonl(tmp_path / "run/rollouts.jsonl")
    assert len(rows) == 2 * 8 * 4
    forced = {1: 0, 2: 0}
    total = {1: 0, 2: 0}
    for row in rows:
        sampled = row.get("sampled", [True] * len(row["ids"]))
        close = row["tokens"].index(">")
        # Three tokens that did not close the thinking, and `+>`.
        assert close < 3 or (row["tokens"][3] == "+" and close == 4)
        assert [i for i, drawn in enumerate(sampled) if not drawn] == ([3, 4] if close == 4 else [])
        for token, number, shown in zip(row["tokens"], row["num_allowed"], row["allowed"], strict=True):
            assert len(shown) == min(number, 8) and (number > 8 or token in shown)
        # Behind two digits only `#` may follow.
        assert row["num_allowed"][-1] == (1 if len(row["tokens"]) - close == 4 else 11)
        forced[row["step"]] += sampled.count(False)
        total[row["step"]] += len(sampled)
    logged = {row["step"]: row for row in read_jsonl(tmp_path / "run/metrics.jsonl") if "control/forced_share" in row}
    for step in (1, 2):
        assert forced[step] > 0 and logged[step]["control/forced_share"] == pytest.approx(forced[step] / total[step])
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert "forced, not sampled" in (tmp_path / "run/report.html").read_text()
