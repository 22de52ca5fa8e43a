"""Changes to a network's structure: adapters, experts, extra inputs."""
