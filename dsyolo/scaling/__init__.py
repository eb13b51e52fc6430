"""How a training scales on the machines at hand: it is run at each size, and what it leaves is put together."""
