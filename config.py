# Settings of cluster.py. Two of them matter before the first session: AWS_REGION just below, and
# MITSUBA_PACKAGE near the end. All others are right for most people as they are.

# --- Your AWS account -------------------------------------------------------

# Best left empty: then the usual AWS ways are used (aws configure, aws sso login,
# AWS_PROFILE, a role). If you do write keys here, keep this file to yourself:
# chmod 600 config.py
AWS_ACCESS_KEY_ID = ""
AWS_SECRET_ACCESS_KEY = ""

# Where your nodes run. A region near you makes Mitsuba's preview quicker; prices differ.
# `./cluster.py regions` lists them.
AWS_REGION = "us-east-1"

# --- How you reach the nodes ------------------------------------------------

# The SSH key: its name in EC2, and the file on your machine with its private half. The
# first createNodes makes both. A relative path starts at the folder of this file.
KEYPAIR_NAME = "mitsuba-key"
SSH_PRIVATE_KEY_FILE = "mitsuba-key.pem"

# The user that the nodes' image has for SSH (Ubuntu's images: "ubuntu"), and SSH's port there.
SSH_USER = "ubuntu"
SSH_PORT = 22

# From where the nodes can be reached, e.g. "203.0.113.7/32". Empty: only from the public
# address that your machine has right now (looked up at checkip.amazonaws.com).
CLIENT_CIDR = ""

# True: Mitsuba on your machine connects straight to the head node's port 7554.
# False: that port stays closed, and Mitsuba connects through `./cluster.py tunnel`.
PUBLIC_SERVER_PORT = True

# --- The nodes --------------------------------------------------------------

# Your own image for a region, e.g. {"us-east-1": "ami-0123456789abcdef0"}. Regions that
# are not listed use Canonical's newest image of UBUNTU_RELEASE.
AMI_IDS: dict[str, str] = {}

# "22.04", "24.04" or "26.04". A build of your own runs on the release on which it was made
# and on later ones; a .deb needs the very release for which it was packaged. 24.04 runs
# what was built on 22.04, 24.04 or Debian 12.
UBUNTU_RELEASE = "24.04"

# A subnet for the nodes, e.g. "subnet-0123456789abcdef0". Empty: your account's default network.
SUBNET_ID = ""

# False: each node gets a public address ($0.005 an hour), even in a subnet that gives none
# by itself. True: it gets none. Then your machine must reach the nodes' private addresses
# (by a VPN into the subnet's network), and install and syncData need a way from there to
# the internet (a NAT gateway, which costs more than the addresses).
PRIVATE_NODES = False

# Size of each node's disk, in GB: about $0.08 a GB and month of a node's life, which is in
# no cost that is shown.
ROOT_VOLUME_GB = 16

# So many hours after their launch (2.5 is fine) the nodes terminate, whatever happens to
# your machine. 0: no such limit.
MAX_HOURS = 0

# After so many minutes without use the nodes terminate: nothing is rendered, nobody types,
# no data is sent. 0: never, and they cost money until you run terminateAll.
IDLE_MINUTES = 60

# --- Mitsuba ----------------------------------------------------------------

# Where Mitsuba comes from:
# - "local": your own build, whose mtssrv is on your PATH; or the path of its folder (dist/).
#   It is packed together with the libraries that it needs.
# - the path or https address of a .deb, of a .tar.gz that holds such a folder, or of a shell
#   script that installs Mitsuba; with "#sha256=…" after it, it is checked.
# - empty: "local" if your machine has such a build, else PKG_REPOSITORY's package mitsuba.
MITSUBA_PACKAGE = ""

# An apt repository that has a package called mitsuba, as a line of sources.list, e.g.
# "deb [signed-by=/path/on/the/node] https://example.org/ubuntu ./"
# This one is Mitsuba's own, and may have nothing for today's Ubuntu: createNodes checks
# that before any cost is incurred.
PKG_REPOSITORY = "deb https://www.mitsuba-renderer.org binary/"

# Where data files lie on the nodes, and where Mitsuba's server runs.
DATA_DIR = "/mnt"

# Where syncData keeps your data files: "s3://your-bucket/some/prefix". As it is here, with
# no bucket, syncData sends a file once from your machine to a node, and on from node to node.
S3_PATH = "s3://XXXXXX"
