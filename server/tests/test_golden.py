"""Golden messages of the wire contract: the same files are decoded by the router's tests."""

from pathlib import Path

import pytest
from google.protobuf import json_format
from text_generation_server.pb import shard_pb2 as pb

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "proto" / "examples"


@pytest.mark.parametrize(("name", "kind"), [("step_plan", pb.StepPlan), ("step_result", pb.StepResult)])
def test_a_golden_message_decodes_to_what_its_description_says(name: str, kind: type) -> None:
    binary = (EXAMPLES / f"{name}.bin").read_bytes()
    described = json_format.Parse((EXAMPLES / f"{name}.json").read_text(), kind())
    assert kind.FromString(binary) == described


def test_the_golden_plan_is_read_as_the_runner_sees_it() -> None:
    from text_generation_server.service import parse_plan

    plan = parse_plan(pb.StepPlan.FromString((EXAMPLES / "step_plan.bin").read_bytes()))
    assert (plan.epoch, plan.step, plan.release) == (3, 41, [5])
    (admission,) = plan.admit
    assert (admission.row, admission.sequence, admission.incarnation) == (2, 7, 1)
    assert list(admission.tokens) == [1, 706, 271, 300]
    assert (admission.num_prompt, admission.cached_len, admission.params.seed) == (3, 0, 2**64 - 1)
    assert [(w.row, w.max_query, w.max_ids, list(w.new_blocks)) for w in plan.work] == [(0, 1, 1, []), (2, 4, 1, [9])]
    params = admission.params
    assert (params.presence_penalty, params.count_penalty, params.logit_bias) == (0.5, 0.25, ((17, -1.5),))
    assert (params.branch, params.top_n, params.min_new_tokens, params.watermark) == (1, 2, 3, True)
    assert admission.prompt_logprobs_from == 1
    assert admission.grammar is not None
    assert (admission.grammar.kind, admission.grammar.source, admission.automaton) == ("REGEX", "[ab]+", None)


def test_what_the_runner_yields_is_written_as_the_golden_result() -> None:
    from text_generation_server.runner import RowResult, Scores
    from text_generation_server.service import row_message

    golden = pb.StepResult.FromString((EXAMPLES / "step_result.bin").read_bytes()).rows[2]
    scores = Scores([-1.5, -0.125], [([8, 9], [-0.5, -1.0]), ([7], [-0.125])])
    assert row_message(RowResult(3, 1, 3, [9], [-0.25], ([9, 4], [-0.25, -2.5]), prompt=scores)) == golden
