"""saefty: sparse autoencoders for the safety of language and vision-language models."""
