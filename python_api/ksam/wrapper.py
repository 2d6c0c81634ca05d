"""An optimizer over another: both show the same groups and state, and make one checkpoint."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from ksam.base import check_base, check_no_overlap, parameters
from ksam.parts import Part
from ksam.radius import Rho, check_radius, radius_at
from ksam_kernels.checks import is_number


@dataclass
class _Radius:
    """A group's rho.

    Attributes:
        schedule: what gives it at every step; None: it is the number in the group.
        last: the last number, restored when a loaded group has no rho.
    """

    schedule: Rho | None
    last: float


#: Parameters of a base whose groups had no rho of their own: the next method over the same base
#: does not take what this one has put there for the user's.
_DEFAULTED: WeakKeyDictionary[Optimizer, set[Tensor]] = WeakKeyDictionary()


def check_not_wrapped(base: type[Optimizer] | Optimizer) -> None:
    """Raise TypeError if the base, or the class to build it of, is sharpness-aware itself."""
    kind = base if isinstance(base, type) else type(base)
    if issubclass(kind, OptimizerWrapper):
        raise TypeError(
            f"base must not be sharpness-aware itself, got {kind.__name__}; pass the optimizer "
            f"under it"
        )


class OptimizerWrapper(Optimizer):
    """Its groups, each with a rho, and its state are the base's; parts have state of their own.

    Args:
        base: the optimizer that takes the steps.
        rho: of groups without one: a radius >= 0, or what gives one at every step.

    Attributes:
        base: as given.
        steps_done: steps so far, those of a resumed run included.
    """

    # torch.optim.Optimizer sets empty groups and state when it is built.
    _built = False

    def __init__(self, base: Optimizer, rho: Rho) -> None:
        check_base(base)
        defaulted = _DEFAULTED.get(base, set())
        for group in base.param_groups:
            if group["params"] and defaulted.issuperset(group["params"]):
                group.pop("rho", None)
        self.base = base
        self.steps_done = 0
        self._rho = check_radius(rho)
        # Keyed by each parameter of a group: loading puts other dicts in the place of groups, and
        # groups may be deleted, sorted and thinned out.
        self._radii: dict[Tensor, _Radius] = {}
        # And by the group itself, since all its parameters may be replaced (fully_shard does).
        self._groups: list[tuple[dict[str, Any], _Radius]] = []
        super().__init__(base.param_groups, dict(base.defaults))
        self._built = True
        self._initial = copy.deepcopy(self._states())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._built:
            self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's."""
        return self.base.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        if self._built:
            self.base.state = state

    def _parts(self) -> dict[str, Part]:
        """The parts of the method that may have state, by name."""
        raise NotImplementedError

    def _perturbs(self) -> bool:
        """Whether some steps perturb the weights, so that groups have a radius."""
        raise NotImplementedError

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise for a group that the method cannot take."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with the default rho unless the group has its own."""
        if not any(param_group is group for group in self.base.param_groups):
            # Sets, which have no order, are the base's to refuse.
            if not isinstance(param_group["params"], (Tensor, set)):
                param_group["params"] = list(param_group["params"])
            self._radius_of_new(param_group)
            check_no_overlap(parameters([*self.base.param_groups, param_group]))
            self.base.add_param_group(param_group)
            for p in param_group["params"]:  # may be known from a group that was deleted
                self._radii.pop(p, None)
        self._adopt_groups()

    def _known(self, group: dict[str, Any]) -> _Radius | None:
        """The radius of a group that has been here before."""
        by_params = (self._radii[p] for p in group["params"] if p in self._radii)
        by_group = (radius for known, radius in self._groups if known is group)
        return next(by_params, None) or next(by_group, None)

    def _radius_of_new(self, group: dict[str, Any]) -> float:
        """The rho of a group that is new here; raises if the group may not be taken."""
        self._check_group(group)
        rho = group.get("rho", self._rho)
        return radius_at(rho, self.steps_done, {**self.base.defaults, **group})

    def _adopt_groups(self) -> None:
        """Make every group's rho a number, even if the base was given or has loaded the group.

        If what gives one was put there instead, that is the group's schedule from now on.
        """
        new = []
        for group in self.param_groups:
            known = self._known(group)
            if known is not None and is_number(group.setdefault("rho", known.last)):
                known.last = group["rho"]
            else:
                new.append(group)
        # All are checked before any is taken.
        radii_of_new = [self._radius_of_new(group) for group in new]
        if new:
            params = parameters(self.param_groups)
            check_no_overlap(params)
            self._radii = {p: self._radii[p] for p in params if p in self._radii}
            defaulted = _DEFAULTED.setdefault(self.base, set())
            defaulted.intersection_update(params)
            present = set(map(id, self.param_groups))
            self._groups = [entry for entry in self._groups if id(entry[0]) in present]
        for group, rho in zip(new, radii_of_new, strict=True):
            if "rho" not in group:
                defaulted.update(group["params"])
            given = group.get("rho", self._rho)
            radius = _Radius(None if is_number(given) else given, rho)
            self._radii.update(dict.fromkeys(group["params"], radius))
            self._groups.append((group, radius))
            group["rho"] = rho
        if not self._perturbs():  # no radius of its own, and none to leave to others
            for group in self.param_groups:
                del group["rho"]

    def _schedule_rho(self) -> None:
        if not self._perturbs():
            return
        values = []
        for group in self.param_groups:
            known = self._known(group)
            schedule = None if known is None else known.schedule
            rho = group["rho"] if schedule is None else schedule
            values.append(radius_at(rho, self.steps_done, group))
        for group, value in zip(self.param_groups, values, strict=True):
            group["rho"] = value

    def _states(self) -> dict[str, dict[str, Any]]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def _load_parts(self, states: dict[str, dict[str, Any]]) -> None:
        for name, part in self._parts().items():
            if states.get(name):
                part.load_state_dict(states[name])

    def state_dict(self) -> dict[str, Any]:
        """The base's state and groups; under ``"ksam"``, the steps done and the parts' state."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._adopt_groups()
        own = {name: state for name, state in self._states().items() if state}
        found = {**self.base.state_dict(), "ksam": {"steps_done": self.steps_done, **own}}
        for after in self._optimizer_state_dict_post_hooks.values():
            replaced = after(self, found)
            found = found if replaced is None else replaced
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or the state of a plain base optimizer, as step 0.

        Parts that have no state in it begin anew. If anything in it is refused, nothing is loaded.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = before(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        own = {"steps_done": 0, **copy.deepcopy(self._initial), **state_dict.get("ksam", {})}
        steps_done = int(own.pop("steps_done"))
        self._adopt_groups()
        for group in state_dict.get("param_groups", ()):  # none if the base has its own layout
            self._radius_of_new({"rho": 0.0, **group})
        present = copy.deepcopy(self._states())
        try:
            self._load_parts(own)
            self.base.load_state_dict({n: v for n, v in state_dict.items() if n != "ksam"})
        except BaseException:
            self._load_parts(present)
            raise
        self.steps_done = steps_done
        self._adopt_groups()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        names = ("base", "steps_done", "_rho", "_radii", "_groups", "_built", "_initial")
        return {"defaults": self.defaults, **{name: getattr(self, name) for name in names}}
