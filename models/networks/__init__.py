"""Networks: backbones and what wraps them, batch norm, recurrent and Bayesian layers."""
