"""EC2, its nodes and S3 on one machine: see README.md beside this file."""
