import re
from pathlib import Path

import numpy as np

from tests.data.toys import Documents

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_worked_example_runs(capsys):
    example, trial, *_ = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(example.splitlines()) < 40
    names = {"__name__": "sums"}
    exec(example, names)
    exec(trial, names)
    shape, words = capsys.readouterr().out.split(") ")
    assert shape == "(8, 64"
    assert re.fullmatch(r"\+ \d+ = \d+\n", words)
    for split in ("train", "validation"):
        assert len(names["data"].records(split)) > 100
    list(names["data"].eval_batches("validation", names["tokenizer"]))


def test_drawn_batch_matches_code():
    diagram = re.search(r"^tokens .*?^num_bytes.*?$", PAGE, flags=re.DOTALL | re.MULTILINE).group()
    drawn = {line.split()[0]: line.split()[1:] for line in diagram.splitlines()}
    data = Documents(documents=("abcdefghi", "xy"), sequence_length=8, batch_size=2)
    (batch,) = data.eval_batches("validation", data.build_tokenizer())
    padding = batch.segments.ravel() == 0
    for name in ("tokens", "targets"):
        ids = getattr(batch, name).ravel()
        shown = ["." if p else "$" if i == 256 else chr(i) for i, p in zip(ids, padding, strict=True)]
        assert shown == drawn[name], name
    for name in ("weights", "segments", "positions", "num_bytes"):
        np.testing.assert_array_equal(
            getattr(batch, name).ravel(), np.array(drawn[name], float), err_msg=name
        )
