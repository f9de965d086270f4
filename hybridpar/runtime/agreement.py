"""What a plan and the arguments of a job have to agree on."""

from __future__ import annotations

from hybridpar.errors import PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.plan import Plan
from hybridpar.runtime.elementwise import check_rowwise
from hybridpar.runtime.loss import Loss
from hybridpar.runtime.update import OptimizerFactory


def check_agreement(plan: Plan, chain: Chain, max_norm: float | None, *, scaled: bool, sharding: bool) -> None:
    """Raise PlanError where a plan was made for another model, or for other settings of the optimizer.

    ``max_norm`` is the largest global norm of the gradients, if they are clipped; ``scaled`` says whether the loss
    is, ``sharding`` whether there is what makes sharded optimizers.
    """
    if plan.chain != chain.fingerprint:
        raise PlanError(
            f"plan.chain: the plan is for chain {plan.chain} of model {plan.model}, but {chain.model} is "
            f"{chain.fingerprint}; plan again for this model"
        )
    if plan.recipe.clipping != (max_norm is not None):
        raise PlanError(
            f"plan.recipe.clipping: {plan.recipe.clipping}, but the largest norm is {max_norm}; "
            "plan again with the optimizer's settings"
        )
    if plan.recipe.scaling != scaled:
        raise PlanError(
            f"plan.recipe.scaling: {plan.recipe.scaling}, but the loss is "
            f"{'scaled' if scaled else 'not scaled'}; plan again with train.loss_scale as it is"
        )
    if plan.recipe.sharding == "none":
        return
    if not sharding:
        raise PlanError(f"plan.recipe.sharding: {plan.recipe.sharding}, but the job has no such optimizer")
    if chain.memory_format is not None:
        raise PlanError(
            f"plan.recipe.sharding: {plan.recipe.sharding} takes parameters apart in their usual order, but "
            f"the model's memory_format is {chain.memory_format}; drop one"
        )


def check_sampling(plan: Plan, loss: Loss, optimizer: OptimizerFactory) -> None:
    """Raise PlanError where plan and loss sample the head's classes otherwise, ConfigError for the optimizer."""
    if plan.recipe.sampling != loss.sampled:
        raise PlanError(
            f"plan.recipe.sampling: {plan.recipe.sampling}, but the loss has sampled={loss.sampled}; "
            "give both the same share, and plan again"
        )
    if loss.sampled is not None:
        check_rowwise(optimizer)
