"""Charts by task: which there are, and that a page draws them."""

import json

from jaxrl_llm.metrics.report.build import build
from jaxrl_llm.metrics.report.tasks import is_of_task, task_charts

ROWS = [
    {"step": 1, "reward": 0.5, "task/a/reward": 0.25, "task/b.2/reward": 0.75, "task/a/groups": 0.5, "task/b.2/groups": 0.5},
    {"step": 2, "eval/exact": 0.5, "eval/a/exact": 0.5, "eval/mismatch_kl": 0.0, "task/b.2/reward": 1.0},
]  # fmt: skip


def test_one_line_for_each_task_with_numbers():
    assert task_charts(ROWS) == [
        ("reward by task", ("task/a/reward", "task/b.2/reward")),
        ("evaluation by task: exact", ("eval/a/exact",)),
        ("share of the groups by task", ("task/a/groups", "task/b.2/groups")),
    ]
    forms = [{"step": 1, "form/plain/success": 0.5, "form/b.2/success": 0.25, "form/plain/groups": 0.5}]
    assert task_charts(forms) == [
        ("success by form of the prompt", ("form/plain/success", "form/b.2/success")),
        ("share of the groups by form of the prompt", ("form/plain/groups",)),
    ]
    assert task_charts([{"step": 1, "eval/exact": 1.0, "time/task": 1.0}]) == []
    names = ("task/a/reward", "eval/a/pass@1", "eval/pass@1", "time/a/b", "task/a", "task/a/b/c")
    assert [is_of_task(name) for name in names] == [True, True, False, False, False, False]


def test_a_page_has_them_and_leaves_out_what_is_no_number(tmp_path):
    rows = [*ROWS, {"step": 3, "task/a/reward": "no number"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = build(tmp_path).read_text()
    assert "reward by task" in page and "task/b.2/reward" in page and "1 line is left out" in page
