"""Property tests here have no deadline per example: the machine may be busy."""

from hypothesis import settings

settings.register_profile("tools", deadline=None)
settings.load_profile("tools")
