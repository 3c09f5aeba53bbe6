"""From hidden states to the outputs of experts: gate, router, groups, runner, foresight."""
