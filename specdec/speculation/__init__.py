"""What drafters, verifiers and the engine share: drafts, acceptance, draft trees, sampling, the plug-in registry."""
