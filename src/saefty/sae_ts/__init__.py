"""SAE-targeted steering: vectors that move chosen latents and little else."""
