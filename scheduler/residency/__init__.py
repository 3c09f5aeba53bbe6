"""Which experts are in memory: affinity, policies, prediction, precision, and who holds which slot."""
