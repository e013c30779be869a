"""How the ids of one sequence are drawn."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Each option has its neutral value by default, with which it costs nothing."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    branch: int = 0
    top_n: int = 0
    count_penalty: float = 0.0
    min_new_tokens: int = 0
    watermark: bool = False

    @property
    def counts_ids(self) -> bool:
        """Whether some option depends on how often an id has occurred."""
        penalties = (self.frequency_penalty, self.presence_penalty, self.count_penalty)
        return self.repetition_penalty != 1.0 or any(penalty != 0.0 for penalty in penalties)

    @property
    def is_filtered(self) -> bool:
        """Whether some ids cannot be drawn however likely they are among the rest."""
        return self.top_k > 0 or self.top_p < 1.0 or self.typical_p < 1.0
