# Settings of cluster.py. Edit what you need; each line says what it is for.

# --- Your AWS account -------------------------------------------------------

# Best left empty: then the usual AWS ways are used (aws configure, aws sso login,
# AWS_PROFILE, a role). If you do write keys here, keep this file to yourself:
# chmod 600 config.py
AWS_ACCESS_KEY_ID = ""
AWS_SECRET_ACCESS_KEY = ""

# Where your nodes run. A region near you makes the preview quicker; prices differ.
# `./cluster.py regions` lists them.
AWS_REGION = "us-east-1"

# --- How you reach the nodes ------------------------------------------------

# The key pair's name in EC2, and the file with its private half. The first
# createNodes makes both. A relative path starts at the folder of this file.
KEYPAIR_NAME = "mitsuba-key"
SSH_PRIVATE_KEY_FILE = "mitsuba-key.pem"

# The user that the image has (Ubuntu's images: "ubuntu"), and sshd's port.
SSH_USER = "ubuntu"
SSH_PORT = 22

# Who may connect to the nodes, e.g. "203.0.113.7/32". Empty: only the public address
# that this machine has right now (looked up at checkip.amazonaws.com).
CLIENT_CIDR = ""

# True: Mitsuba on your machine connects straight to the head node's port 7554.
# False: that port stays closed and you use `./cluster.py tunnel` instead.
PUBLIC_SERVER_PORT = True

# --- The nodes --------------------------------------------------------------

# The image for a region, e.g. {"us-east-1": "ami-0123456789abcdef0"}. A region that
# is not listed uses Canonical's newest image of UBUNTU_RELEASE.
AMI_IDS: dict[str, str] = {}

# "22.04", "24.04" or "26.04". A build of your own runs on the release that it was made
# on and on later ones; a .deb wants the very release for which it was packaged. 24.04
# runs what was built on 22.04, 24.04 or Debian 12, and has free security updates until
# 2029 (22.04: until April 2027).
UBUNTU_RELEASE = "24.04"

# A subnet, e.g. "subnet-0123456789abcdef0". Empty: your account's default network.
SUBNET_ID = ""

# False: each node gets a public address ($0.005 an hour), also in a subnet that gives
# none by itself. True: it gets none. Then this machine must reach the nodes' private
# addresses (a VPN into the subnet's network), and install and syncData need a way from
# there to the internet (a NAT gateway, which costs more than the addresses).
PRIVATE_NODES = False

# Size of each node's disk, in GB.
ROOT_VOLUME_GB = 16

# Nodes end themselves after so many hours (2.5 is fine), whatever happens to your
# machine. 0: never, and they cost money until you run terminateAll.
MAX_HOURS = 0

# Nodes end themselves after so many minutes without use: nothing is rendered or sent, nobody
# types, no client moves data. 0: never.
IDLE_MINUTES = 60

# --- Mitsuba ----------------------------------------------------------------

# The apt repository that has a package called mitsuba, as a line of sources.list:
# "deb [signed-by=/path/on/the/node] https://example.org/ubuntu ./"
# This is the original's; it may have nothing for today's Ubuntu. createNodes tells
# you before it costs anything.
PKG_REPOSITORY = "deb https://www.mitsuba-renderer.org binary/"

# "local": your own build, whose mtssrv is on your PATH; or the path of its folder, upstream's
# dist/. It is packed with its libraries. Otherwise the path or https address of a .deb, of a
# .tar.gz, or of a shell script that installs Mitsuba; "#sha256=…" after it is checked.
# Empty: "local" if there is such a build, else the package mitsuba from PKG_REPOSITORY.
MITSUBA_PACKAGE = ""

# Where data files lie on the nodes, and where the server runs.
DATA_DIR = "/mnt"

# Where syncData keeps your data files: "s3://your-bucket/some/prefix". As it is here, without a bucket,
# syncData sends a file once from your machine to a node, and on from node to node.
S3_PATH = "s3://XXXXXX"
