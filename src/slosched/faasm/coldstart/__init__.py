"""The ladder of cold starts, rung by rung, as the paper's table 3 has it for containers and Faaslets."""
