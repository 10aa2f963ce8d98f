"""How deep to draft: what steps cost, how often drafted tokens are accepted, and the policy that weighs both."""

from specdec.engine.depth.acceptance import RowHistory
from specdec.engine.depth.costs import Costs
from specdec.engine.depth.policy import MOST, AutoDepth, DepthChoice, DepthPolicy, FixedDepth, StepReport

__all__ = ["MOST", "AutoDepth", "Costs", "DepthChoice", "DepthPolicy", "FixedDepth", "RowHistory", "StepReport"]
