"""Language models: where their blocks are, how they tokenise, how they are read and edited."""
