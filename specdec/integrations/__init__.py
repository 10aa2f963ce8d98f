"""specdec inside other libraries."""
