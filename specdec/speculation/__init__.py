"""What drafters and verifiers share: drafts and their acceptance, trees, sampling, and the registry of plug-ins."""
