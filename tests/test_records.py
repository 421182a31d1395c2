"""Records: immutable, strict, with one spelling in JSON."""

import pytest

from tarflow_scale.config.sampling import Guidance, SamplingConfig
from tarflow_scale.errors import RegistryError
from tarflow_scale.records import Calibration, FileRecord, MetricsReport, PixelFormat, canonical_json


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


SAMPLING = (
    b'{"batch_size":128,"decoder":{"kind":"exact","precision":"fp32","tolerance":0.001},"denoise":0.0,'
    b'"guidance":{"annealed":false,"attention_temperature":1.0,"blocks":"all","scale":0.5,"what":"both"},'
    b'"temperature":1.0}'
)
REPORT = (
    b'{"baselines":{},"grid":null,"metrics":{},"model":"m","packages":{},"sampling":%s,"seconds":1.0,"version":1,'
    b'"weights_digest":"d"}'
)
DECODING = (
    b'{"adaptive_seconds":0.5,"batch_size":8,"blocks":[{"chunk":1,"planned":1}],"device":"cpu","exact_seconds":0.5,'
    b'"guidance":{"annealed":false,"attention_temperature":1.0,"blocks":"all","scale":0.5,"what":"both"},'
    b'"iterations":[1.0],"max_error":0.0,"mean_error":0.0,"pixels_within_one_level":1.0,"precision":"fp32",'
    b'"tensors_digest":"t","tolerance":0.001}'
)


def test_how_images_were_sampled_is_a_section_and_its_bytes_stay_the_same() -> None:
    """The bytes are those of version 0.1.0."""
    report = MetricsReport.from_json(REPORT % SAMPLING, "x")
    assert report.sampling == SamplingConfig(guidance=Guidance(scale=0.5))
    assert report.to_json() == REPORT % SAMPLING
    plan = Calibration.from_json(DECODING, "x")
    assert plan.guidance == report.sampling.guidance
    assert plan.to_json() == DECODING


def test_sampling_is_validated_where_a_record_is_read_and_later_settings_are_at_their_defaults() -> None:
    assert MetricsReport.from_json(REPORT % b'{"temperature":0.9}', "x").sampling == SamplingConfig(temperature=0.9)
    with pytest.raises(
        RegistryError, match=r"x is not a MetricsReport \(sampling.temperature: .*greater than or equal"
    ):
        MetricsReport.from_json(REPORT % b'{"temperature":-1}', "x")
