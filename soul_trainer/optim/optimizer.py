"""`Soul`: momenta, decay, state and its dtypes, and the steps that move nothing. What a direction is, is a rule."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .checks import check_refresh, check_settings
from .partition import Partition, local
from .rules import RULES, Bucket, MatrixCurvature, Rule, shares
from .states import accumulate, check_states, gradients_of, new_state
from .updates import Updates


class Soul(Optimizer):
    r"""
    Second-order optimizer for unlearning. The gradient of what is to be forgotten and that of what is to be kept each
    have a momentum of their own; a rule turns a momentum into a direction, both are brought to one size, and added.

        m_forget <- beta1 m_forget + (1 - beta1) g_forget      (likewise m_retain)
        d = m / (h / mean(h) + damping)                        (rule "diagonal")
        u = clip(0.3 d / rms(d), -1, 1)                        (scaling "tensor")
        theta <- theta (1 - lr weight_decay) - lr (forget_weight u_forget + retain_weight u_retain)

    The optimizer does not know how a Hessian is estimated, nor which loss a gradient is of. What is no step of the
    weights is *a step that moves nothing*, inside a context, so that its gradient takes the way of every other one
    (backward, reduction, unscaling, sharding):

        with optimizer.hessian_refresh(scale=num_sampled_tokens):
            optimizer.step()                    # h <- beta2 h + (1 - beta2) scale g^2
        with optimizer.forget_gradient():
            optimizer.step()                    # m_forget <- beta1 m_forget + (1 - beta1) g
        optimizer.step()                        # m_retain likewise, and the weights move

    State is made at the first step of either kind rather than here, because engines swap parameters for flat
    partitions after construction.

    Args:
        params (`Iterable`): Parameters or parameter groups, as for every PyTorch optimizer.
        lr (`float`, *optional*, defaults to 1e-4): Learning rate, >= 0; its unit is the scaling's.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`):
            Decay of the momenta (beta1) and of the Hessian per refresh (beta2), each in [0, 1).
        rule (`str`, *optional*, defaults to `"diagonal"`): A name of the table in `rules.py`.
        scaling (`str`, *optional*, defaults to `"tensor"`): A name of the table in `scaling.py`.
        two_directions (`bool`, *optional*, defaults to `False`):
            Whether the forget gradient has a momentum of its own, for which [`Soul.forget_gradient`] is to be used in
            each step.
        damping (`float`, *optional*, defaults to 0.1): Added to the Hessian, as a share of its mean, > 0.
        damping_scope (`str`, *optional*):
            Whose mean that is: by default each `"tensor"`'s and, in a trust region, the `"model"`'s, or a tensor that
            no row reached would take the whole step.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled weight decay, >= 0.
        rho (`float`, *optional*, defaults to 0.04): Of the rule `sophia`, its curvature scale, > 0.
        eps (`float`, *optional*, defaults to 1e-15): Of the rule `sophia`, added to the denominator, > 0.
        bias_correction (`bool`, *optional*, defaults to `True`):
            Whether `h` is divided by the sum of the weights in its average (1 - beta2^k after k refreshes).
        maximize (`bool`, *optional*, defaults to `False`): Whether to ascend.
        foreach (`bool`, *optional*): Whether to use multi-tensor kernels; by default yes. Results are the same.
        hessian_interval (`int`, *optional*):
            If set, every `hessian_interval`-th `step()` first folds its own squared gradient into `h` with scale 1.
        state_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of the momenta: `torch.float32`, at least the parameter's, or `torch.bfloat16`, half the memory.

    Attributes:
        partition ([`~partition.Partition`]): Whose tensors the parameters hold; an engine may replace it.
        matrices (`Mapping[str, MatrixCurvature]`): The curvature of matrices, by name, for the rule `kronecker`.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If a parameter is complex or a gradient sparse.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        rule: str = "diagonal",
        scaling: str = "tensor",
        two_directions: bool = False,
        damping: float = 0.1,
        weight_decay: float = 0.0,
        *,
        damping_scope: str | None = None,
        rho: float = 0.04,
        eps: float = 1e-15,
        bias_correction: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        hessian_interval: int | None = None,
        state_dtype: torch.dtype = torch.float32,
    ):
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "rule": rule,
            "scaling": scaling,
            "two_directions": two_directions,
            "damping": damping,
            "damping_scope": damping_scope or ("model" if scaling == "trust_region" else "tensor"),
            "weight_decay": weight_decay,
            "rho": rho,
            "eps": eps,
            "bias_correction": bias_correction,
            "maximize": maximize,
            "foreach": foreach,
            "hessian_interval": hessian_interval,
            "state_dtype": str(state_dtype).removeprefix("torch."),
            "forget_weight": 1.0,
            "retain_weight": 1.0,
        }
        check_settings(defaults)
        super().__init__(params, defaults)
        self._begin()

    def _begin(self) -> None:
        self.partition = Partition()
        self._matrices: Mapping[str, MatrixCurvature] = {}
        self._inside: Callable[[], None] | None = None
        self._updates = Updates()
        # The groups of the last step's parameters, by parameter, because ZeRO-3 empties the groups between its steps.
        self._stepped: dict[Tensor, dict] = {}
        # Those that ever had a gradient here.
        self._reached: set[Tensor] = set()
        # Elements of Hessians that a refresh left as they were, because its estimate was not finite there.
        self.num_kept_out: Tensor | int = 0

    @property
    def matrices(self) -> Mapping[str, MatrixCurvature]:
        """The curvature of matrices, by name of the tensor."""
        return self._matrices

    @matrices.setter
    def matrices(self, matrices: Mapping[str, MatrixCurvature]) -> None:
        self._matrices = matrices
        self._updates.forget()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if not hasattr(self, "partition"):  # a copy; PyTorch comes here with what is loaded as well
            self._begin()
        self._updates.forget()
        self._stepped = {}

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group of parameters; see [`torch.optim.Optimizer.add_param_group`]."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.is_complex():
                self.param_groups.pop()
                raise TypeError(f"Sophia has no rule for complex parameters, and one has dtype {param.dtype}.")

    def merge_groups(self) -> None:
        """Makes one of all parameter groups, which must have the same settings."""
        first, *others = self.param_groups
        for group in others:
            first["params"] += group["params"]
        self.param_groups[:] = [first]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """
        Moves the parameters or, inside [`Soul.hessian_refresh`] or [`Soul.forget_gradient`], folds their gradients in
        and moves nothing.

        Args:
            closure (`Callable`, *optional*): Recomputes the gradients and returns the loss.

        Returns:
            `float`, *optional*: What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._inside is not None:
            self._inside()
            return loss
        buckets = list(self._buckets())
        if any(param in self._stepped for bucket in buckets for param in bucket.params):
            self._stepped = {}  # or else the engine is at another group of the same step
        for bucket in buckets:
            interval = bucket.group["hessian_interval"]
            due = [param for param in bucket.params if interval and int(self.state[param]["step"]) % interval == 0]
            if due:
                self._fold(self._bucket(bucket.group, due), 1.0, bucket.group["betas"][1], square=True)
            self._average(bucket, "exp_avg")
        for bucket, halves in self._updates.halves(buckets):
            lr, weights = bucket.group["lr"], bucket.weights()
            update = self._updates.joined(bucket, halves)
            # theta <- theta (1 - lr weight_decay) - lr update
            torch._foreach_mul_(update, -lr)
            torch._foreach_mul_(weights, 1 - lr * bucket.group["weight_decay"])
            torch._foreach_add_(weights, update)
            for param in bucket.params:
                self.state[param]["step"] += 1
                self._stepped[param] = bucket.group
            del halves, update
        return loss

    @contextmanager
    def hessian_refresh(self, scale: float, decay: float | None = None, square: bool = True) -> Iterator[None]:
        """
        A context in which `step()` refreshes the Hessian and moves nothing.

        Args:
            scale (`float`):
                Factor of the estimate, > 0. For the gradient of a mean over B sampled labels it is B (Sophia's
                equation for the Gauss-Newton-Bartlett estimator).
            decay (`float`, *optional*):
                Weight of the old `h` in [0, 1), by default beta2. With j/(j+1) at the j-th refresh (from 0), `h` is
                the plain mean of the estimates.
            square (`bool`, *optional*, defaults to `True`):
                Whether to square the gradient; an estimator of the diagonal itself (Hutchinson) says `False`.
        """
        check_refresh(scale, decay)
        with self._moving_nothing("hessian_refresh", lambda: self.update_hessian(scale, decay, square)):
            yield

    @contextmanager
    def forget_gradient(self) -> Iterator[None]:
        """A context in which `step()` averages the gradient into the forget half's momentum and moves nothing."""
        self._check_two_directions()
        with self._moving_nothing("forget_gradient", self.update_forget_momentum):
            yield

    @torch.no_grad()
    def update_hessian(self, scale: float, decay: float | None = None, square: bool = True) -> None:
        """
        Folds the gradients that are there now into the Hessian: `h <- decay h + (1 - decay) scale g^2`. For plain
        loops; the arguments are those of [`Soul.hessian_refresh`].
        """
        check_refresh(scale, decay)
        for bucket in self._buckets():
            self._fold(bucket, scale, bucket.group["betas"][1] if decay is None else decay, square)

    @torch.no_grad()
    def update_forget_momentum(self) -> None:
        """Averages the gradients that are there now into the momentum of the forget half. For plain loops."""
        self._check_two_directions()
        for bucket in self._buckets():
            self._average(bucket, "exp_avg_forget")

    @torch.no_grad()
    def set_hessian(self, diagonals: Mapping[str, Tensor]) -> None:
        """
        Takes a Hessian that was measured elsewhere for its own.

        Args:
            diagonals (`Mapping[str, torch.Tensor]`): By name of the tensor, of its shape, whole on every process.

        Raises:
            ValueError: If a tensor that trains is not among them, or has another shape.
        """
        if not RULES[self.defaults["rule"]].has_hessian:
            raise ValueError(f"`rule`={self.defaults['rule']!r} keeps no Hessian: there is nothing to set.")
        for param in self.partition.params(self.param_groups):
            if not self.state[param]:
                self.state[param] = new_state(self.param_groups[0], param)
            hessian = local(self.state[param]["hessian"])
            for section in self.partition.sections(param):
                found = diagonals.get(section.name)
                if found is None or found.shape != section.shape:
                    raise ValueError(
                        f"The curvature of {section.name}, of shape {tuple(section.shape)}, is "
                        + ("not there." if found is None else f"of shape {tuple(found.shape)}.")
                    )
                section.of(hessian).copy_(self.partition.part(param, section, found))
            self.state[param]["hessian_weight"].fill_(1.0)
        self._updates.forget()

    def describe(self, learning_rates: list[float]) -> dict[str, dict[str, float]]:
        """
        What the last step did, from the state that it left and by the functions that it went by.

        Args:
            learning_rates (`list[float]`): Of the parameter groups, in that step.

        Returns:
            `dict[str, dict[str, float]]`: See [`~updates.Updates.describe`].
        """
        rates = {id(group): rate for group, rate in zip(self.param_groups, learning_rates)}
        buckets = list(self._stepped_buckets())
        return self._updates.describe(buckets, [rates[id(bucket.group)] for bucket in buckets])

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Loads the optimizer's state, in its own dtypes where PyTorch would cast it to the parameter's. Parameter groups
        without parameters, which some engines drop, need no match.
        """
        saved = [group for group in state_dict["param_groups"] if group["params"]]
        if len(saved) == sum(bool(group["params"]) for group in self.param_groups):
            left = iter(saved)
            groups = [next(left) if group["params"] else {**group, "params": []} for group in self.param_groups]
            state_dict = {**state_dict, "param_groups": groups}
        check_states(state_dict["state"], self.defaults)
        super().load_state_dict(state_dict)
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved_ids, params):
            for key, value in state_dict["state"].get(index, {}).items():
                loaded = self.state[param][key]
                if key == "hessian_weight":
                    self.state[param][key] = value.cpu().clone()  # a host number, which each step reads
                elif isinstance(value, Tensor) and loaded.dtype != value.dtype:
                    self.state[param][key] = value.to(loaded.device, copy=True)

    def _check_two_directions(self) -> None:
        if not self.defaults["two_directions"]:
            raise ValueError("`two_directions` must be True for a forget gradient to have a momentum of its own.")

    @contextmanager
    def _moving_nothing(self, name: str, step: Callable[[], None]) -> Iterator[None]:
        if self._inside is not None:
            raise ValueError(f"`{name}` is inside another such context: steps that move nothing cannot be nested.")
        self._inside = step
        try:
            yield
        finally:
            self._inside = None

    @staticmethod
    def _rule(group: dict) -> Rule:
        return RULES[group["rule"]]

    def _bucket(self, group: dict, params: list[Tensor]) -> Bucket:
        states = [{key: local(value) for key, value in self.state[param].items()} for param in params]
        return Bucket(group, params, states, self.partition, self.matrices if group["rule"] == "kronecker" else {})

    def _buckets(self) -> Iterator[Bucket]:
        """Parameters that have a gradient, by group and by what one multi-tensor kernel can take; their state made."""
        if any(p.grad is not None and p.grad.is_sparse for group in self.param_groups for p in group["params"]):
            raise TypeError("Sophia needs dense gradients: build the embedding with `sparse=False`.")
        # PyTorch's distributed checkpoints want a state of each parameter, even of one that never has a gradient.
        is_sharded = any(isinstance(param, DTensor) for group in self.param_groups for param in group["params"])
        for group in self.param_groups:
            kinds = defaultdict(list)
            for param in group["params"]:
                if param.grad is None and not is_sharded and not self.state.get(param):
                    continue
                if not self.state[param]:
                    self.state[param] = new_state(group, param)
                if param.grad is not None:
                    self._reached.add(param)
                # In two directions, a half that does not reach a parameter has a gradient of zero there.
                is_reached = param in self._reached or float(self.state[param]["step"]) > 0
                if param.grad is not None or (group["two_directions"] and is_reached):
                    kinds[self.partition.layout(param), type(param), param.device, param.dtype].append(param)
            for params in kinds.values():
                for share in shares(params, group["foreach"]):
                    yield self._bucket(group, share)

    def _stepped_buckets(self) -> Iterator[Bucket]:
        kinds = defaultdict(list)
        for param, group in self._stepped.items():
            kinds[id(group), self.partition.layout(param), type(param), param.device, param.dtype].append(param)
        for params in kinds.values():
            group = self._stepped[params[0]]
            for share in shares(params, group["foreach"]):
                yield self._bucket(group, share)

    def _average(self, bucket: Bucket, momentum: str) -> None:
        # m <- beta1 m + (1 - beta1) g
        beta1 = bucket.group["betas"][0]
        averages = [state[momentum] for state in bucket.states]
        added = torch._foreach_mul(gradients_of(bucket), 1 - beta1)
        accumulate(averages, beta1, added)

    def _keep_out(self, hessians: list[Tensor], added: list[Tensor], decay: float) -> None:
        """Has what is not finite change nothing: an infinite `h` would freeze a weight for good."""
        # A norm is one fast pass, and a refresh where all is finite, as nearly every one, needs no other.
        if torch.stack(torch._foreach_norm(added, 2)).isfinite().all():
            return
        for hessian, estimate in zip(hessians, added):
            is_bad = ~estimate.isfinite()
            self.num_kept_out = self.num_kept_out + is_bad.sum()
            estimate.copy_(torch.where(is_bad, hessian.to(estimate.dtype) * (1 - decay), estimate))

    def _fold(self, bucket: Bucket, scale: float, decay: float, square: bool) -> None:
        if not self._rule(bucket.group).has_hessian:
            raise ValueError(f"`rule`={bucket.group['rule']!r} keeps no Hessian: there is nothing to refresh.")
        gradients = gradients_of(bucket)
        estimates = torch._foreach_mul(gradients, gradients) if square else gradients
        # h <- decay h + (1 - decay) scale estimate
        added = torch._foreach_mul(estimates, scale * (1 - decay))
        hessians = [state["hessian"] for state in bucket.states]
        self._keep_out(hessians, added, decay)
        accumulate(hessians, decay, added)
        for state in bucket.states:
            state["hessian_weight"].mul_(decay).add_(1 - decay)
        self._updates.forget()
