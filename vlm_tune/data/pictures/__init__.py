"""Pictures and videos of the rows: read safely, measured, varied, and what an encoder saw in them kept."""
