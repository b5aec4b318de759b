"""How updates are computed: in a forward, in a backward, into a weight."""
