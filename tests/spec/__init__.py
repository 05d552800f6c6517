"""The specification: identities, the oracles and strategies they use, and the wrong implementations they kill."""
