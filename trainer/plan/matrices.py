"""The matrices of a model: their kinds, and which of them LoRA adapts. Does not import torch.

--lora_target_modules means the same in every family, in the plan and in the run. "attention": the
linear maps of the modules that mix tokens (attention, linear attention, state space). "experts":
the matrices of the routed experts. "all-linear": the linear maps of the decoder layers without
those of the experts, so attention, dense MLPs and shared experts. Anything else is the end of a
module's or an expert matrix' name. modeling/survey.py tells the kinds, by a model's structure.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from trainer.errors import RunError, did_you_mean

ATTENTION, DENSE, EXPERTS, ROUTER, OTHER = "attention", "dense", "experts", "router", "other"
HEAD, EMBEDDING = "head", "embedding"
# What a keyword of --lora_target_modules adapts.
KEYWORDS = {"all-linear": (ATTENTION, DENSE), "attention": (ATTENTION,), "experts": (EXPERTS,)}
NEEDED = "all-linear, attention, experts, or the ends of modules' names; several with commas"


@dataclass(frozen=True)
class Matrix:
    """A matrix, or several alike.

    name: dotted, of the module, or of the parameter where it is stacked. out, into: widths.
    kind: one of those above; OTHER is no linear map, or outside of the layers. copies: how many
    there are. used: how many of them a token goes through, on average. stacked: the copies are one
    tensor, a module's own parameter. reason: why it cannot have an adapter; None where it can.
    """

    name: str
    out: int
    into: int
    kind: str = DENSE
    copies: int = 1
    used: float = 1
    stacked: bool = False
    reason: str | None = None

    @property
    def size(self) -> int:
        """Parameters of all copies."""
        return self.copies * self.out * self.into

    @property
    def active(self) -> float:
        """Parameters that a token is multiplied with."""
        return self.used * self.out * self.into

    @property
    def parent(self) -> str:
        """The name of the module that holds it."""
        return self.name.removesuffix(".weight").rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """The last part of the name that tells something."""
        return self.name.removesuffix(".weight").rpartition(".")[2]

    def adapter(self, rank: int) -> list[int]:
        """Return the elements of each tensor of its LoRA adapters."""
        if self.stacked:
            return [rank * self.into * self.copies, rank * self.out * self.copies]
        return [rank * self.into, rank * self.out] * self.copies


def words_of(targets: str) -> list[str]:
    """Return the words of --lora_target_modules."""
    return targets.replace(",", " ").split()


def adapted(matrices: Iterable[Matrix], targets: str, tied: bool) -> list[Matrix]:
    """Return the matrices that have an adapter. targets: --lora_target_modules.

    tied: the head is the embedding. Raise RunError for a name that the model lacks, and for what
    cannot be adapted.
    """
    matrices, words = list(matrices), words_of(targets)
    if not words:
        raise RunError("lora_target_modules is empty", needed=NEEDED)
    chosen: dict[Matrix, None] = {}
    for word in words:
        found = _of_kinds(word, matrices) if word in KEYWORDS else _named(word, matrices)
        chosen.update(dict.fromkeys(found))
    for matrix in chosen:
        if tied and matrix.kind in (HEAD, EMBEDDING):
            raise RunError(
                f"lora_target_modules {matrix.leaf}: embedding and head are one tensor",
                found="tie_word_embeddings: an adapter on one of them would change both when "
                "it is merged",
                fix=f"leave {matrix.leaf} out of --lora_target_modules",
            )
    return list(chosen)


def _of_kinds(word: str, matrices: list[Matrix]) -> list[Matrix]:
    kinds = KEYWORDS[word]
    of_kinds = [matrix for matrix in matrices if matrix.kind in kinds]
    found = [matrix for matrix in of_kinds if matrix.reason is None]
    if not found:
        refused = next(iter(of_kinds), None)
        raise RunError(
            f"lora_target_modules {word}: this model has none that can be adapted",
            found=f"{refused.name}: {refused.reason}" if refused else f"no {' or '.join(kinds)}",
            needed=NEEDED,
            fix="--lora_target_modules all-linear" if word != "all-linear" else None,
        )
    return found


def _named(name: str, matrices: list[Matrix]) -> list[Matrix]:
    """Return the matrices whose names end with this one, also outside of the decoder layers."""
    found = [m for m in matrices if f".{m.name}".removesuffix(".weight").endswith(f".{name}")]
    refused = next((m for m in found if m.reason), None)
    if refused:
        raise RunError(
            f"lora_target_modules {name} cannot be adapted",
            found=f"{refused.name}: {refused.reason}",
            fix=f"leave {name} out",
        )
    if not found:
        leaves = sorted({m.leaf for m in matrices if m.reason is None})
        raise RunError(
            f"lora_target_modules {name} is not in the model"
            f"{did_you_mean(name, [*leaves, *KEYWORDS])}",
            needed=f"{', '.join(KEYWORDS)}, or some of {', '.join(leaves)}",
        )
    return found
