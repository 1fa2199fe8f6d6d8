"""bfloat16 where the processor has it, and where it does not."""

from __future__ import annotations

import pytest

from app.cli import precision
from app.cli.builder import MetaboltCLI
from tests.support.toy import command

INTEL = "processor\t: 0\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\nflags\t\t: fpu avx2 {}\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("text", "has"),
    [
        (INTEL.format("avx512_bf16", "avx512_bf16"), True),
        (INTEL.format("amx_bf16", "amx_bf16"), True),
        (INTEL.format("avx512f", "avx512f"), False),
        (ARM.format("bf16"), True),
        (ARM.format("sve"), False),
        ("processor\t: 0\n", True),
    ],
)
def test_the_processors_flags_tell(text, has, monkeypatch, tmp_path):
    """Catches a flag of another instruction set taken for it, and a processor that tells nothing taken for slow."""
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(precision, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(precision.platform, "system", lambda: "Linux")
    precision.has_bfloat16.cache_clear()
    try:
        assert precision.has_bfloat16() == has
    finally:
        precision.has_bfloat16.cache_clear()


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("asked", ["bf16-mixed", "bf16-true", "32-true", "64-true"])
@pytest.mark.parametrize("keep", ["false", "true"])
def test_bfloat16_is_single_precision_where_it_is_slower(has, asked, keep, tmp_path, monkeypatch, capsys):
    """Catches a training twelve times as slow as without the setting that is to make it fast."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: has)
    cli = MetaboltCLI(command("ProtoNet", tmp_path, "--trainer.precision", asked, "--keep_precision", keep))
    slow = asked.startswith("bf16") and not has and keep == "false"
    assert cli.trainer.precision == ("32-true" if slow else asked)
    assert f"precision: {asked}" in cli.yaml()  # which another machine may go on with
