"""How deep to draft: what steps cost, how often drafted tokens are accepted, and the policy that weighs both."""

from specdec.engine.depth.calibration import History
from specdec.engine.depth.costs import Costs
from specdec.engine.depth.policy import MAX_DEPTH, AutoDepth, DepthChoice, DepthPolicy, FixedDepth, StepReport

__all__ = ["MAX_DEPTH", "AutoDepth", "Costs", "DepthChoice", "DepthPolicy", "FixedDepth", "History", "StepReport"]
