"""Back ends of ``loha_core.apply``."""
