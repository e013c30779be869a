"""The Triton form of GPTQ's column loop against the plain one, in Triton's interpreter: no GPU is needed."""

import importlib.util
import os
import subprocess
import sys

from text_generation_server.kernels.columns import has_triton

PROGRAM = """
import torch
from text_generation_server.kernels.columns import _round_columns
from text_generation_server.kernels.cuda.columns import round_columns_fused

generator = torch.Generator().manual_seed(0)
for columns, rows, shared in ((32, 40, True), (16, 33, False)):
    weight = torch.randn(columns, rows, generator=generator) * 0.05
    upper = torch.triu(torch.randn(columns, columns, generator=generator) * 0.2, 1)
    upper += torch.diag(torch.rand(columns, generator=generator) + 0.5)
    scale = torch.rand(1 if shared else columns, rows, generator=generator) * 0.01 + 0.005
    zero = torch.randint(1, 16, scale.shape, generator=generator).float()
    scale, zero = scale.expand(columns, -1), zero.expand(columns, -1)
    results = []
    for form in (_round_columns, round_columns_fused):
        work, codes, errors = weight.clone(), torch.empty(columns, rows, dtype=torch.uint8), torch.empty(columns, rows)
        form(work, upper, scale, zero, 15, codes, errors)
        results.append((work, codes, errors))
    (work, codes, errors), found = results
    # A code may differ where rounding errors decide; what follows it in its row then differs too.
    same = (codes == found[1]).all(0)
    assert same.double().mean() > 0.9, same
    assert 4 < len(codes.unique()) <= 16
    torch.testing.assert_close(found[0][:, same], work[:, same], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2][:, same], errors[:, same], atol=1e-5, rtol=1e-4)
print("same")
"""


def test_the_fused_column_loop_rounds_as_the_plain_one() -> None:
    assert has_triton() == (importlib.util.find_spec("triton") is not None)
    if not has_triton():
        return  # a torch without CUDA comes without it, and the plain form is used
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "same\n", done.stderr
