"""The router's auxiliary loss, where the model's configuration asks for it."""

from typing import Any

import torch
from torch import Tensor, nn

from data.dataset import IGNORED


class RouterLoss:
    """Keep what the model computes to balance the load of its experts.

    Where config.output_router_logits is true, transformers computes it from the router logits of
    all layers, and adds it to the loss of the labels. Our loss takes the logits only.
    """

    def __init__(self, model: nn.Module, coefficient: float) -> None:
        self.coefficient = coefficient
        self.loss: Tensor | None = None
        model.register_forward_hook(self._keep)

    def _keep(self, model: nn.Module, args: Any, output: Any) -> None:
        self.loss = getattr(output, "aux_loss", None) if torch.is_grad_enabled() else None

    @classmethod
    def install(cls, model: Any) -> "RouterLoss | None":
        """Install it on a model whose configuration asks for this loss, else return None."""
        config = model.config.get_text_config()
        names = ("router_aux_loss_coef", "aux_loss_coef")
        coefficient = next((c for n in names if (c := getattr(config, n, None))), 0.0)
        wanted = getattr(config, "output_router_logits", False)
        return cls(model, coefficient) if wanted and coefficient else None

    def summed(self, labels: Tensor) -> Tensor | float:
        """Return the last batch's loss, times its labels: it is added to a sum over them.

        So the step's loss has the mean of its micro-batches, weighted by their labels; of one batch
        it is what transformers adds. labels: [B, S].
        """
        if self.loss is None:
            return 0.0
        loss, self.loss = self.loss, None
        return self.coefficient * loss * labels[:, 1:].ne(IGNORED).sum()
