"""Records: immutable, strict, with one spelling in JSON."""

import pytest

from tarflow_scale.errors import RegistryError
from tarflow_scale.records import FileRecord, MetricsReport, PixelFormat, canonical_json


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == '{"a":[1.5,"é"],"b":1}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_a_record_comes_back_and_a_stranger_is_refused() -> None:
    record = PixelFormat(bit_depth=4, noise="uniform")
    assert PixelFormat.from_json(record.to_json(), "x") == record
    with pytest.raises(RegistryError, match=r"x is not a PixelFormat \(bit_depth: Field required\)"):
        PixelFormat.from_json(b'{"noise":"uniform"}', "x")
    with pytest.raises(RegistryError, match=r"\(new: Extra inputs are not permitted\)"):
        PixelFormat.from_json(b'{"bit_depth":4,"noise":"uniform","new":1}', "x")
    with pytest.raises(ValueError, match="frozen"):
        record.bit_depth = 8  # type: ignore[misc]


@pytest.mark.parametrize("sha256", ["", "abc", "G" * 64, "../../etc/passwd"])
def test_a_digest_is_a_digest(sha256: str) -> None:
    with pytest.raises(ValueError, match="sha256"):
        FileRecord(sha256=sha256, bytes=1)


def test_reports_of_the_early_form_can_still_be_read() -> None:
    early = {"model": "m", "version": 1, "weights_digest": "d", "metrics": {}, "baselines": {}, "seconds": 1.0}
    report = MetricsReport.model_validate({**early, "guidance": 0.15, "temperature": 0.9, "packages": {}})
    assert report.sampling == {"temperature": 0.9, "guidance": {"scale": 0.15}}
    assert MetricsReport.from_json(report.to_json(), "x") == report
