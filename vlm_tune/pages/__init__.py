"""Every page that a verb or a run writes: one base page, one stylesheet, charts."""
