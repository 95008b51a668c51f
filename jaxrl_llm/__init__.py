"""jaxrl_llm: reinforcement learning of language models, native to JAX and TPUs. Begin reading at `train.py`.

    import jaxrl_llm as rl

The public names are below; docs/scripting.md shows them in a loop of one's own. Each is imported when it is first used, so that
importing the package is instant and does not start JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxrl_llm import errors as errors
    from jaxrl_llm import train as train
    from jaxrl_llm.config.loading import load as load_config  # noqa: F401
    from jaxrl_llm.config.run_config import RunConfig as RunConfig
    from jaxrl_llm.control import controls as controls
    from jaxrl_llm.distribution.loss_terms import Loss as Loss
    from jaxrl_llm.distribution.loss_terms import Terms as Terms
    from jaxrl_llm.distribution.score import TokenScores as TokenScores
    from jaxrl_llm.environments.grader import Sample as Sample
    from jaxrl_llm.environments.grader import make_grader as make_grader
    from jaxrl_llm.environments.grader_pool import GraderPool as GraderPool
    from jaxrl_llm.errors import UserError as UserError
    from jaxrl_llm.experience import curricula as curricula
    from jaxrl_llm.experience import filters as filters
    from jaxrl_llm.metrics import estimates as estimates
    from jaxrl_llm.model.config import ModelConfig as ModelConfig
    from jaxrl_llm.objective import advantages as advantages
    from jaxrl_llm.objective import losses as losses
    from jaxrl_llm.objective.config import ObjectiveConfig as ObjectiveConfig
    from jaxrl_llm.objective.credit import make_advantage as make_advantage
    from jaxrl_llm.objective.presets import preset as preset
    from jaxrl_llm.parallel.mesh import make_mesh as make_mesh
    from jaxrl_llm.roles.grading import grade as grade
    from jaxrl_llm.roles.loaded_model import Model as Model
    from jaxrl_llm.roles.loaded_model import load_model as load_model
    from jaxrl_llm.roles.loaded_model import save_model as save_model
    from jaxrl_llm.roles.model_programs import make_batch as make_batch
    from jaxrl_llm.roles.model_programs import make_publish as make_publish
    from jaxrl_llm.roles.model_programs import make_score as make_score
    from jaxrl_llm.roles.model_programs import make_update as make_update
    from jaxrl_llm.roles.sampler import next_prompts as next_prompts
    from jaxrl_llm.roles.stored_rollouts import read_trajectories as read_trajectories
    from jaxrl_llm.roles.stored_rollouts import write_trajectories as write_trajectories
    from jaxrl_llm.rollout import trees as trees
    from jaxrl_llm.rollout.config import RolloutConfig as RolloutConfig
    from jaxrl_llm.rollout.engine import Engine as Engine
    from jaxrl_llm.rollout.sample import Controls as Controls
    from jaxrl_llm.rollout.session import Session as Session
    from jaxrl_llm.rollout.tree import Branches as Branches
    from jaxrl_llm.tasks.config import ArithmeticTask as ArithmeticTask
    from jaxrl_llm.tasks.config import CharacterTokenizer as CharacterTokenizer
    from jaxrl_llm.tasks.config import PretrainedTokenizer as PretrainedTokenizer
    from jaxrl_llm.tasks.task import load_task as load_task
    from jaxrl_llm.types import Batch as Batch
    from jaxrl_llm.types import Credit as Credit
    from jaxrl_llm.types import Finish as Finish
    from jaxrl_llm.types import Groups as Groups
    from jaxrl_llm.types import Policy as Policy
    from jaxrl_llm.types import Prompts as Prompts
    from jaxrl_llm.types import Rollouts as Rollouts
    from jaxrl_llm.types import Scores as Scores
    from jaxrl_llm.types import TrainState as TrainState
    from jaxrl_llm.types import check as check

__version__ = "0.1.0"

# Module, or module:object, of each public name. A name that is also a module of this package is that module: importing it
# anywhere makes it the attribute here, so any other object would be replaced. So training is `rl.train.train(cfg)`.
_PLACES = {
    # Stages, as modules of functions and classes.
    "advantages": "objective.advantages",
    "controls": "control.controls",
    "curricula": "experience.curricula",
    "errors": "errors",
    "estimates": "metrics.estimates",
    "filters": "experience.filters",
    "losses": "objective.losses",
    "train": "train",
    "trees": "rollout.trees",
    # What a loop is made of, in its order.
    "make_mesh": "parallel.mesh:make_mesh",
    "load_model": "roles.loaded_model:load_model",
    "save_model": "roles.loaded_model:save_model",
    "load_task": "tasks.task:load_task",
    "next_prompts": "roles.sampler:next_prompts",
    "Engine": "rollout.engine:Engine",
    "Session": "rollout.session:Session",
    "grade": "roles.grading:grade",
    "GraderPool": "environments.grader_pool:GraderPool",
    "make_grader": "environments.grader:make_grader",
    "write_trajectories": "roles.stored_rollouts:write_trajectories",
    "read_trajectories": "roles.stored_rollouts:read_trajectories",
    "preset": "objective.presets:preset",
    "make_advantage": "objective.credit:make_advantage",
    "make_score": "roles.model_programs:make_score",
    "make_batch": "roles.model_programs:make_batch",
    "make_update": "roles.model_programs:make_update",
    "make_publish": "roles.model_programs:make_publish",
    # Values that travel.
    "Model": "roles.loaded_model:Model",
    "Policy": "types:Policy",
    "TrainState": "types:TrainState",
    "Prompts": "types:Prompts",
    "Controls": "rollout.sample:Controls",
    "Rollouts": "types:Rollouts",
    "Branches": "rollout.tree:Branches",
    "Finish": "types:Finish",
    "Sample": "environments.grader:Sample",
    "Groups": "types:Groups",
    "Scores": "types:Scores",
    "Credit": "types:Credit",
    "Batch": "types:Batch",
    "TokenScores": "distribution.score:TokenScores",
    "Terms": "distribution.loss_terms:Terms",
    "Loss": "distribution.loss_terms:Loss",
    "check": "types:check",
    "UserError": "errors:UserError",
    # Configs.
    "load_config": "config.loading:load",
    "RunConfig": "config.run_config:RunConfig",
    "ModelConfig": "model.config:ModelConfig",
    "RolloutConfig": "rollout.config:RolloutConfig",
    "ObjectiveConfig": "objective.config:ObjectiveConfig",
    "ArithmeticTask": "tasks.config:ArithmeticTask",
    "CharacterTokenizer": "tasks.config:CharacterTokenizer",
    "PretrainedTokenizer": "tasks.config:PretrainedTokenizer",
}

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, member = _PLACES[name].partition(":")
    found = importlib.import_module(f"{__name__}.{module}")
    found = getattr(found, member) if member else found
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
