"""Every page that a verb or a run writes: one frame, one stylesheet, charts."""
