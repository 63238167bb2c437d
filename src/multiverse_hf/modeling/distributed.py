"""Decisions that the processes of one tensor-parallel model make together."""

from typing import Any

import torch


class Broadcast:
    """Sends the first process's decisions to all processes of a tensor-parallel model.

    They must make the same forward passes. So what depends on the clock or on a caller is decided once.
    """

    def __init__(self, model: Any) -> None:
        self.group: Any = None
        self.device = model.device
        if (getattr(model, "tp_size", None) or 1) > 1:
            mesh = next(weight.device_mesh for weight in model.parameters() if hasattr(weight, "device_mesh"))
            self.group = mesh.get_group("tp" if "tp" in (mesh.mesh_dim_names or ()) else None)

    @property
    def leads(self) -> bool:
        """This process decides."""
        return self.group is None or torch.distributed.get_rank(self.group) == 0

    def __call__(self, decision: Any) -> Any:
        """Return the first process's decision, which must pickle; all processes have to call."""
        if self.group is None:
            return decision
        box = [decision]
        torch.distributed.broadcast_object_list(box, group=self.group, group_src=0, device=self.device)
        return box[0]
