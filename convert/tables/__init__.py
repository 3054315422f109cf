"""Which stored tensor becomes which leaf: the rules as data, one table a model."""
