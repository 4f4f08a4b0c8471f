"""Pictures and videos of the rows: read safely, measured, augmented, and their features cached."""
