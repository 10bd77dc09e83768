"""What is seen on photographs: poses of people, from networks and from files."""
