"""A sharded optimizer in plain torch, in any precision, on ranks that are threads: DeepSpeed's in short."""

from __future__ import annotations

import threading
from itertools import accumulate

import torch

from hybridpar.planning.communicators import groups as groups_of
from hybridpar.planning.zero import ALIGNMENT
from hybridpar.runtime.groups import grouped


class Board:
    """Where the threads of a communicator lay down their parts for each other."""

    def __init__(self, plan):
        self.members = {(name, rank): members for name, members in groups_of(plan) for rank in members}
        self._barriers = {key: threading.Barrier(len(key[1])) for key in groups_of(plan)}
        self._parts = {}

    def gather(self, name, rank, part, whole):
        """Fill ``whole`` with the parts of all members."""
        members = self.members[name, rank]
        self._parts[name, rank] = part
        self._barriers[name, members].wait(60.0)
        for place, member in zip(whole.chunk(len(members)), members, strict=True):
            place.copy_(self._parts[name, member])
        self._barriers[name, members].wait(60.0)


class PlainEngine:
    """Keeps this rank's part of every group's flat parameters, updates it and gathers all."""

    def __init__(self, named, groups, factory, board, name, rank):
        self._gather = lambda part, whole: board.gather(name, rank, part, whole)
        members = board.members[name, rank]
        self.sharers, self.index = len(members), members.index(rank)
        made = factory(grouped(named, groups))
        self.flats, self.places = [], {}
        for number, options in enumerate(made.param_groups):
            parameters = options["params"]
            begins = list(accumulate((p.numel() for p in parameters), initial=0))
            size = -(-begins[-1] // (ALIGNMENT * self.sharers)) * ALIGNMENT
            flat = torch.zeros(size * self.sharers, dtype=parameters[0].dtype)
            for p, begin in zip(parameters, begins, strict=False):
                flat[begin : begin + p.numel()] = p.detach().flatten()
                p.data = flat[begin : begin + p.numel()].view_as(p)
                self.places[p] = number, begin
            self.flats.append(flat)
            options["params"] = [torch.nn.Parameter(flat.chunk(self.sharers)[self.index].clone())]
        self.optimizer = made
        self.masters = [g["params"][0] for g in made.param_groups]
        self.parts = [torch.zeros_like(m, requires_grad=False) for m in self.masters]

    def place(self, parameter):
        return self.places[parameter]

    def step(self):
        for master, part in zip(self.masters, self.parts, strict=True):
            master.grad = part
        self.optimizer.step()
        for master, flat in zip(self.masters, self.flats, strict=True):
            master.grad = None
            self._gather(master.detach(), flat)

    def tensors(self):
        """All that lasts from step to step."""
        states = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [*self.flats, *self.masters, *self.parts, *states]

    def fragments(self):
        return {}

    def load(self, fragments):
        del fragments


def plain_engines(factory, plan, board, rank):
    """What ``zero.make_engines`` returns, of plain engines; ``rank`` is one of all ranks."""

    def make(position, blocks, groups):
        named = [(o.name, o.tensor) for b in blocks for o in b.owned if o.tensor.requires_grad]
        return PlainEngine(named, groups, factory, board, position.gradients(plan.locate(rank)[1]), rank)

    return make
