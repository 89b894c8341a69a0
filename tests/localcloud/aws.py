"""moto, mended where it differs from AWS in ways that this tool can notice.

`mend(cloud)` replaces moto's Instance by one that drives a real node, and wraps the calls
in which moto is laxer or poorer than AWS. Each wrapper says what AWS does.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol
from xml.sax.saxutils import escape

from tests.localcloud.delays import PACES, Seconds, is_late, lag, note_birth
from tests.localcloud.places import ACCOUNT, REGION

JAMMY, NOBLE, ARM = "ami-0a0e5d9c7acc336f1", "ami-0e2c8caa4b6378d8c", "ami-0123456789abcdef0"
RESOLUTE = "ami-0c8ca7be1b4637d8e"
STATES = {"pending": 0, "running": 16, "shutting-down": 32, "terminated": 48, "stopping": 64, "stopped": 80}
ALIVE = ("pending", "running")
USER_SHUTDOWN = "Client.UserInitiatedShutdown"
OWN_SHUTDOWN = "Client.InstanceInitiatedShutdown"
SPOT_PRICE = 0.0871  # $ an hour in the first zone; each further zone costs a tenth more
RATES = {"c1.xlarge": 0.52, "c5.large": 0.085, "c7i.large": 0.08925, "t3.micro": 0.0104}


class Node(Protocol):
    """What stands behind an instance."""

    public_ip: str | None
    answered: float | None

    def start(self, public_ip: str | None) -> None:
        """Boot."""

    def stop(self, grace: float = 6) -> None:
        """Shut down and take away."""

    def reboot(self) -> None:
        """Reboot."""

    def fault(self, what: str) -> None:
        """Make something go wrong; ValueError where this kind of node has no such fault."""

    def console(self) -> str:
        """Return the console's text."""

    def set_rules(self, rules: str) -> None:
        """Replace the security group's rules."""


@dataclass
class Options:
    """What AWS does late or refuses; changed through the control address."""

    list_lag: Seconds = PACES["short"]["list_lag"]
    address_lag: Seconds = PACES["short"]["address_lag"]
    created_lag: Seconds = PACES["short"]["created_lag"]
    ending_lag: Seconds = PACES["short"]["ending_lag"]
    holding_lag: Seconds = PACES["short"]["holding_lag"]
    forgotten: list[str] = field(default_factory=list)  # instances that lists show and calls that name them don't know
    refusing_regions: dict[str, str] = field(default_factory=dict)  # region -> the code of its refusals
    spot_prices: dict[str, float] = field(default_factory=dict)  # zone -> $ an hour, where it is not the usual one
    capacity: dict[str, int] = field(default_factory=dict)  # zone -> instances that it has left
    vcpu_limit: int = 0  # 0: no quota
    launch_faults: list[str] = field(default_factory=list)  # of the next instances, one each ("": none)


@dataclass
class Cloud:
    """What the patches below need from the daemon."""

    make_node: Callable[[Any], Node]
    public_addresses: Iterator[str]
    private_addresses: Iterator[str] | None  # None: moto's, from the subnet
    public_names: bool
    options: Options = field(default_factory=Options)
    instances: dict[str, Any] = field(default_factory=dict)


def image(image_id: str, name: str, architecture: str, boot_mode: str) -> dict[str, Any]:
    """Return one AMI as moto reads them."""
    return {
        "ami_id": image_id,
        "architecture": architecture,
        "boot_mode": boot_mode,
        "description": f"Canonical, Ubuntu (local cloud), {architecture}",
        "hypervisor": "xen",
        "image_location": f"099720109477/{name}",
        "image_type": "machine",
        "name": name,
        "owner_id": "099720109477",
        "platform": None,
        "product_codes": [],
        "public": True,
        "root_device_name": "/dev/sda1",
        "root_device_type": "ebs",
        "sriov": "simple",
        "state": "available",
        "virtualization_type": "hvm",
    }


IMAGES = [
    image(JAMMY, "ubuntu/images/hvm-ssd/ubuntu-jammy-22.04-amd64-server-20261012", "x86_64", "uefi-preferred"),
    image(NOBLE, "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-20261015", "x86_64", "uefi-preferred"),
    image(
        RESOLUTE, "ubuntu/images/hvm-ssd-gp3/ubuntu-resolute-26.04-amd64-server-20261015", "x86_64", "uefi-preferred"
    ),
    image(ARM, "ubuntu/images/hvm-ssd/ubuntu-jammy-22.04-arm64-server-20261012", "arm64", "uefi"),
    image("ami-0fedcba9876543210", "secure/uefi-only-amd64", "x86_64", "uefi"),
]


def prepare_environment(folder: Path) -> None:
    """Set what moto reads from the environment when it is imported; call this first."""
    (folder / "images.json").write_text(json.dumps(IMAGES))
    os.environ["MOTO_AMIS_PATH"] = str(folder / "images.json")
    os.environ["MOTO_ACCOUNT_ID"] = ACCOUNT
    for check in ("EC2_ENABLE_INSTANCE_TYPE", "ENABLE_KEYPAIR", "ENABLE_AMI"):
        os.environ[f"MOTO_{check}_VALIDATION"] = "true"


def error_response(code: str, message: str, status: int = 400) -> tuple[int, dict[str, str], str]:
    """Return an EC2 error as moto's handlers may return one, with any HTTP status."""
    body = (
        f"<Response><Errors><Error><Code>{code}</Code><Message>{escape(message)}</Message></Error></Errors>"
        "<RequestID>00000000-0000-0000-0000-000000000000</RequestID></Response>"
    )
    return status, {"Content-Type": "text/xml", "status": str(status)}, body


def price_list(kind: str) -> str:
    """Return the Pricing API's answer to GetProducts for one instance type."""
    price = {"unit": "Hrs", "pricePerUnit": {"USD": f"{RATES[kind]:.10f}"}} if kind in RATES else None
    term = {"T": {"priceDimensions": {"D": price}}}
    products = [json.dumps({"terms": {"OnDemand": term}})] if price else []
    return json.dumps({"FormatVersion": "aws_v1", "PriceList": products})


QUOTA_NAMES = {  # of a few codes that Service Quotas has for EC2
    "L-1216C47A": "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances",
    "L-34B43A08": "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests",
}


def quota(cloud: Cloud, code: str) -> str:
    """Return Service Quotas' answer to GetServiceQuota."""
    value = float(cloud.options.vcpu_limit or 1152)
    return json.dumps({"Quota": {"QuotaCode": code, "QuotaName": QUOTA_NAMES[code], "Value": value}})


def mend(cloud: Cloud) -> None:
    """Make moto behave; moto must not have been imported before prepare_environment()."""
    mend_addresses(cloud)
    mend_instances(cloud)
    mend_launches(cloud)
    mend_lists(cloud)
    mend_security_groups(cloud)
    mend_spot(cloud)
    seed_parameters()


def mend_addresses(cloud: Cloud) -> None:
    """Give out our own public addresses: moto's belong to strangers."""
    import moto.ec2.models.elastic_ip_addresses as elastic
    import moto.ec2.models.elastic_network_interfaces as interfaces
    from moto.ec2.models.subnets import Subnet

    def next_public_address() -> str:
        return next(cloud.public_addresses)

    interfaces.random_public_ip = next_public_address
    elastic.random_ip = next_public_address
    if cloud.private_addresses:
        private = cloud.private_addresses
        Subnet.get_available_subnet_ip = lambda self, instance: next(private)


def mend_instances(cloud: Cloud) -> None:
    """Put a real node behind each instance; states change when the node's do."""
    import moto.ec2.models.instances as models
    from moto.core.utils import utcnow
    from moto.ec2.exceptions import EC2ClientError

    class CloudInstance(models.Instance):
        __module__ = "moto.ec2.models.instances"  # moto's metaclass reads the service from it

        @property
        def security_groups(self) -> Any:
            """Return what EC2 tells of them: nothing from the shutdown on, though they are still held."""
            return [] if self._state.name in ("shutting-down", "terminated") else self.held_groups

        @security_groups.setter
        def security_groups(self, groups: Any) -> None:
            self.held_groups = groups

        def __init__(self, backend: Any, *arguments: Any, **keywords: Any) -> None:
            interfaces = keywords.get("nics") or []
            if not keywords.get("subnet_id") and not interfaces:  # as on AWS: the zone's default subnet
                subnets = backend.get_default_subnets()
                zone = keywords.get("placement") or sorted(subnets)[0]
                keywords["subnet_id"] = subnets[zone].id
            super().__init__(backend, *arguments, **keywords)
            if groups := [name for one in interfaces for name in one.get("Groups", [])]:
                self.security_groups = [backend.get_security_group_from_id(name) for name in groups]
            self.interrupted_at = ""
            self.spot_instance_request_id = None
            self.instance_lifecycle = None
            note_birth(cloud.options, self)
            self._become("pending")
            self.node = cloud.make_node(self)
            cloud.instances[self.id] = self
            threading.Thread(target=self._boot, daemon=True).start()

        @property
        def public_ip(self) -> Any:
            """Return the address, which comes late; an instance that ends has none."""
            late = is_late(cloud.options, "address_lag", self)
            return self.nics[0].public_ip if self.state in ALIVE and not late else None

        public_ip_address = public_ip

        @property
        def public_dns_name(self) -> Any:
            """Return the name, which comes with the address; process nodes have none that would resolve."""
            return self.future_public_name if self.public_ip else None

        @property
        def future_public_name(self) -> str | None:
            """Return the public name that this instance has or will have."""
            address = str(self.nics[0].public_ip or "").replace(".", "-")
            domain = "compute-1" if self.region_name == REGION else f"{self.region_name}.compute"
            return f"ec2-{address}.{domain}.amazonaws.com" if address and cloud.public_names else None

        def _become(self, state: str) -> None:
            self._state.name, self._state.code = state, STATES[state]

        def _boot(self) -> None:
            wrong = cloud.options.launch_faults.pop(0) if cloud.options.launch_faults else ""
            if wrong == "kms":  # a disk's key that the user may not use
                self._end("Client.InternalError", "Client.InternalError: Client error on launch")
                return
            if wrong == "dies":
                self._end("Server.InternalError", "Server.InternalError: Internal error on launch")
                return
            try:
                self.node.start(self.nics[0].public_ip)
                if wrong:
                    self.node.fault(wrong)
            except (OSError, RuntimeError) as error:
                self._end("Server.InternalError", f"Server.InternalError: {error}")
                return
            if self.state == "pending":
                self._become("running")

        def _end(self, code: str, message: str) -> None:
            super().terminate()
            self._reason = f"User initiated ({utcnow():%Y-%m-%d %H:%M:%S} GMT)" if code == USER_SHUTDOWN else ""
            self.state_reason = models.StateReason(message, code)
            self._become("shutting-down")

            def finish() -> None:
                self.node.stop()
                time.sleep(lag(cloud.options, "ending_lag", self))
                self._become("terminated")
                cloud_end_of_spot(self)
                time.sleep(lag(cloud.options, "holding_lag", self))  # its network interface outlives it
                self.held_groups = []

            threading.Thread(target=finish, daemon=True).start()

        def vanish(self) -> None:
            """End at once, without AWS's delays: for the tests' own clearing up."""
            if self.state in ALIVE:
                super().terminate()
            self.node.stop(0)
            self._become("terminated")
            self.held_groups = []

        def node_exited(self) -> None:
            """The node powered itself off: terminated, or stopped, as it was launched."""
            self._end(OWN_SHUTDOWN, f"{OWN_SHUTDOWN}: Instance initiated shutdown")

        def terminate(
            self, code: str = USER_SHUTDOWN, message: str = f"{USER_SHUTDOWN}: User initiated shutdown"
        ) -> Any:
            """Start the shutdown; return the state before, as TerminateInstances does."""
            before = models.InstanceState(self._state.name, self._state.code)
            if before.name not in ("terminated", "shutting-down"):
                self._end(code, message)
            return before

        def stop(self) -> Any:
            """Refuse: this cloud's nodes have no disk that survives."""
            raise EC2ClientError("UnsupportedOperation", f"The instance '{self.id}' can't be stopped here.")

        start = stop

        def reboot(self) -> None:
            """Reboot the node."""
            threading.Thread(target=self.node.reboot, daemon=True).start()

        def interrupt(self, seconds: float) -> None:
            """Reclaim a spot instance SECONDS from now, with the notice that AWS gives."""
            self.interrupted_at = f"{utcnow() + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%SZ}"
            reason = "Server.SpotInstanceTermination"
            end = threading.Timer(seconds, self.terminate, (reason, f"{reason}: Spot instance termination"))
            end.daemon = True
            end.start()

    models.Instance = CloudInstance


def cloud_end_of_spot(instance: Any) -> None:
    """Close the spot request of an instance that ends."""
    request = instance.ec2_backend.spot_instance_requests.get(instance.spot_instance_request_id)
    if request and request.state == "active":
        reclaimed = instance.interrupted_at
        request.state = "closed"
        request.status_code = "instance-terminated-no-capacity" if reclaimed else "instance-terminated-by-user"


def mend_launches(cloud: Cloud) -> None:
    """RunInstances: MaxCount, ClientToken, capacity, quota, spot, and no public address in the answer."""
    import moto.ec2.responses.general as general
    from moto.core.responses import ActionResult
    from moto.core.types import Base64EncodedString
    from moto.core.utils import utcnow
    from moto.ec2.exceptions import EC2ClientError
    from moto.ec2.responses.instances import InstanceResponse

    plain = InstanceResponse.run_instances
    launches: dict[tuple[str, str, str], tuple[str, Any]] = {}
    lock = threading.Lock()

    def run_instances(self: Any) -> Any:
        with lock:
            return launch(self)

    def launch(self: Any) -> Any:
        parameters = self.params
        token = parameters.get("ClientToken") or ""
        key = (self.current_account, self.region, token)
        # AWS: the same token and parameters replay the first answer, others are refused.
        sent = json.dumps({k: v for k, v in parameters.items() if k != "ClientToken"}, sort_keys=True, default=str)
        if token in launches_of(key):
            before, reservation = launches[key]
            if before != sent:
                return error_response(
                    "IdempotentParameterMismatch",
                    "Arguments on this idempotent request are inconsistent with arguments used in previous request(s).",
                )
            return ActionResult(reservation)
        if refusal := flatten_network(parameters) or check_launch(self, cloud):
            return refusal
        zone = zone_of(self)
        count = int(parameters["MaxCount"])
        if zone in cloud.options.capacity:
            count = min(count, cloud.options.capacity[zone])
            cloud.options.capacity[zone] -= count
        parameters["MinCount"] = count
        result = plain(self)
        if token:
            launches[key] = (sent, result.result)
        if parameters.get("InstanceMarketOptions"):
            make_spot_requests(self, result.result)
        return result

    def launches_of(key: tuple[str, str, str]) -> tuple[str, ...]:
        return (key[2],) if key[2] and key in launches else ()

    def get_console_output(self: Any) -> Any:
        instance = self.ec2_backend.get_instance(self._get_param("InstanceId"))
        text = Base64EncodedString.from_raw_string(instance.node.console())
        return ActionResult({"InstanceId": instance.id, "Timestamp": utcnow(), "Output": text})

    InstanceResponse.run_instances = run_instances
    general.General.get_console_output = get_console_output
    assert issubclass(EC2ClientError, Exception)


def flatten_network(parameters: dict[str, Any]) -> Any:
    """Put the one NetworkInterface of a launch where moto expects its parts; AWS refuses both ways at once."""
    interfaces = parameters.pop("NetworkInterfaces", [])
    if interfaces and (parameters.get("SubnetId") or parameters.get("SecurityGroupIds")):
        text = (
            "Network interfaces and an instance-level subnet ID or security groups may not be specified on one request"
        )
        return error_response("InvalidParameterCombination", text)
    for interface in interfaces:
        parameters["SubnetId"], parameters["SecurityGroupIds"] = interface["SubnetId"], interface["Groups"]
        parameters["AssociatePublicIpAddress"] = interface.get("AssociatePublicIpAddress")
    return None


@functools.cache
def types_of_zone(region: str, zone: str) -> set[str]:
    """Return the instance types that a zone offers."""
    from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS

    offers = INSTANCE_TYPE_OFFERINGS["availability-zone"][region]
    return {offer["InstanceType"] for offer in offers if offer["Location"] == zone}


def zone_of(response: Any) -> str:
    """Return the zone in which a RunInstances call would launch."""
    interfaces = response.params.get("NetworkInterfaces") or [{}]
    subnet = response.params.get("SubnetId") or interfaces[0].get("SubnetId")
    if subnet:
        return str(response.ec2_backend.get_subnet(subnet).availability_zone)
    placement = response.params.get("Placement") or {}
    return str(placement.get("AvailabilityZone") or f"{response.region}a")


def check_launch(response: Any, cloud: Cloud) -> Any:
    """Return the refusal that AWS would give to this RunInstances call, or None."""
    parameters = response.params
    low, high = int(parameters.get("MinCount", 1)), int(parameters.get("MaxCount", 1))
    if not 1 <= low <= high:
        return error_response("InvalidParameterValue", f"Invalid value '{low}' for minCount.")
    kinds = {spec.get("ResourceType") for spec in parameters.get("TagSpecifications", [])}
    spot = parameters.get("InstanceMarketOptions")
    if "spot-instances-request" in kinds and not spot:
        return error_response(
            "InvalidParameterCombination",
            "The parameter 'spot-instances-request' tags can only be used with a Spot market type.",
        )
    if spot and parameters.get("InstanceInitiatedShutdownBehavior") == "stop":
        return error_response(
            "InvalidParameterCombination",
            "The instance initiated shutdown behavior 'stop' is not supported for one-time Spot instances.",
        )
    zone = zone_of(response)
    if spot and (refused := check_spot_price(response, cloud, zone, spot.get("SpotOptions") or {})):
        return refused
    known = response.ec2_backend.describe_instance_types([parameters["InstanceType"]])
    if known and parameters["InstanceType"] not in types_of_zone(response.region, zone):
        return error_response(
            "Unsupported",
            f"Your requested instance type ({parameters['InstanceType']}) is not supported in your requested "
            f"Availability Zone ({zone}). Please retry your request by not specifying an Availability Zone or "
            "choosing another one.",
        )
    return check_capacity(response, cloud, zone, low, high)


def spot_price(backend: Any, cloud: Cloud, kind: str, zone: str) -> float:
    """Return the present spot price of an instance type in a zone."""
    offers = backend.describe_instance_type_offerings(
        location_type="availability-zone", filters={"instance-type": [kind]}
    )
    zones = sorted(one["Location"] for one in offers)
    number = zones.index(zone) if zone in zones else 0
    return cloud.options.spot_prices.get(zone, SPOT_PRICE * (1 + 0.1 * number))


def check_spot_price(response: Any, cloud: Cloud, zone: str, options: dict[str, Any]) -> Any:
    """Return AWS's refusal of a spot launch whose maximum is below the zone's price, or None."""
    price = spot_price(response.ec2_backend, cloud, response.params["InstanceType"], zone)
    highest = float(options.get("MaxPrice") or price)
    if highest < price:
        return error_response(
            "SpotMaxPriceTooLow",
            f"Your Spot request price of {highest:g} is lower than the minimum required Spot request fulfillment "
            f"price of {price:g}.",
        )
    return None


def check_capacity(response: Any, cloud: Cloud, zone: str, low: int, high: int) -> Any:
    """Return AWS's refusal where the quota or the zone is too small, or None."""
    kind = response.params["InstanceType"]
    if cloud.options.vcpu_limit:
        sizes = {kind: response.ec2_backend.describe_instance_types([kind])[0]["VCpuInfo"]["DefaultVCpus"]}
        used = sum(sizes.get(i.instance_type, 2) for i in cloud.instances.values() if i.state in ALIVE)
        if used + sizes[kind] * high > cloud.options.vcpu_limit:
            return error_response(
                "VcpuLimitExceeded",
                f"You have requested more vCPU capacity than your current vCPU limit of {cloud.options.vcpu_limit} "
                "allows for the instance bucket that the specified instance type belongs to. Please visit "
                "http://aws.amazon.com/contact-us/ec2-request to request an adjustment to this limit.",
            )
    if cloud.options.capacity.get(zone, high) < low:
        return error_response(
            "InsufficientInstanceCapacity",
            f"We currently do not have sufficient {kind} capacity in the Availability Zone you requested ({zone}). "
            "Our system will be working on provisioning additional capacity.",
            status=500,
        )
    return None


def mend_lists(cloud: Cloud) -> None:
    """DescribeInstances: pages of instances (moto: of reservations), and the lag of a list."""
    from moto.core.responses import ActionResult
    from moto.ec2.exceptions import EC2ClientError
    from moto.ec2.models.instances import Reservation
    from moto.ec2.responses.instances import InstanceResponse

    def describe_instances(self: Any) -> Any:
        filters, wanted = self._filters_from_querystring(), self._get_param("InstanceIds", [])
        pairs = [
            (reservation, instance)
            for reservation in self.ec2_backend.describe_instances(filters=filters)
            for instance in reservation.instances
            if not is_late(cloud.options, "list_lag", instance)
        ]
        if wanted:
            known = {instance.id for _, instance in pairs}
            if missing := [name for name in wanted if name not in known]:
                raise EC2ClientError("InvalidInstanceID.NotFound", f"The instance ID '{missing[0]}' does not exist")
            pairs = [pair for pair in pairs if pair[1].id in wanted]
        start, size = int(self._get_param("NextToken") or 0), int(self._get_param("MaxResults") or 1000)
        pages: dict[str, Any] = {}
        for reservation, instance in pairs[start : start + size]:
            page = pages.setdefault(reservation.id, Reservation(reservation.id, reservation.owner_id))
            page.instances.append(instance)
        more = str(start + size) if start + size < len(pairs) else None
        return ActionResult({"Reservations": list(pages.values()), "NextToken": more})

    InstanceResponse.describe_instances = describe_instances


def mend_security_groups(cloud: Cloud) -> None:
    """A group in use can't be deleted, lists show a new one late; a rule is a duplicate whatever its description."""
    from moto.ec2.exceptions import EC2ClientError, InvalidPermissionDuplicateError
    from moto.ec2.models.key_pairs import KeyPairBackend
    from moto.ec2.models.security_groups import SecurityGroup, SecurityGroupBackend

    plain_list = SecurityGroupBackend.describe_security_groups
    plain_delete = SecurityGroupBackend.delete_security_group
    plain_add = SecurityGroup.add_ingress_rule

    def delete_security_group(self: Any, name: str | None = None, group_id: str | None = None) -> None:
        group = self.get_security_group_by_name_or_id(group_id or name)
        users = list(cloud.instances.values())
        if group and any(group.id == used.id for i in users for used in i.held_groups):
            raise EC2ClientError("DependencyViolation", f"resource {group.id} has a dependent object")
        plain_delete(self, name, group_id)

    def add_ingress_rule(self: Any, rule: Any) -> None:
        def identity(one: Any) -> tuple[Any, ...]:
            source = one.source_group.get("GroupId")
            return one.ip_protocol, one.from_port, one.to_port, one.ip_range.get("CidrIp"), source

        if any(identity(rule) == identity(old) for old in self.ingress_rules):
            raise InvalidPermissionDuplicateError()
        plain_add(self, rule)

    def describe_security_groups(self: Any, *arguments: Any, **keywords: Any) -> list[Any]:
        found = plain_list(self, *arguments, **keywords)
        return [group for group in found if not is_late(cloud.options, "created_lag", group)]

    makes_late(cloud, SecurityGroupBackend, "create_security_group")
    makes_late(cloud, KeyPairBackend, "import_key_pair")
    SecurityGroupBackend.describe_security_groups = describe_security_groups
    SecurityGroupBackend.delete_security_group = delete_security_group
    SecurityGroup.add_ingress_rule = add_ingress_rule


def makes_late(cloud: Cloud, backend: Any, call: str) -> None:
    """Let a backend's CALL note when it made what it returns."""
    plain = getattr(backend, call)

    def create(self: Any, *arguments: Any, **keywords: Any) -> Any:
        made = plain(self, *arguments, **keywords)
        note_birth(cloud.options, made)
        return made

    setattr(backend, call, create)


def mend_spot(cloud: Cloud) -> None:
    """Spot prices that move for a day (moto: one constant of 2006), and cancelled requests."""
    from moto.core.responses import ActionResult
    from moto.core.utils import utcnow
    from moto.ec2.exceptions import EC2ClientError
    from moto.ec2.models.spot_requests import SpotRequestBackend
    from moto.ec2.responses.spot_instances import SpotInstances

    plain_list = SpotRequestBackend.describe_spot_instance_requests

    def describe_spot_price_history(self: Any) -> Any:
        kinds = self._get_param("InstanceTypes", [])
        offered = self.ec2_backend.describe_instance_type_offerings(
            location_type="availability-zone", filters={"instance-type": kinds}
        )
        now, history = utcnow(), []
        zones = sorted(one["Location"] for one in offered)
        for zone in zones:
            now_price = spot_price(self.ec2_backend, cloud, kinds[0], zone)
            for hours in range(0, 24, 3):
                price = now_price + SPOT_PRICE * 0.05 * (hours % 5)
                history.append(
                    {
                        "AvailabilityZone": zone,
                        "InstanceType": kinds[0],
                        "ProductDescription": "Linux/UNIX",
                        "SpotPrice": f"{price:.6f}",
                        "Timestamp": (now - timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%S.000Z"),
                    }
                )
        return ActionResult({"SpotPriceHistory": history})

    def cancel_spot_instance_requests(self: Any, request_ids: list[str]) -> list[Any]:
        # AWS remembers a cancelled request, and leaves its instance running; moto forgets it.
        requests = [self.spot_instance_requests.get(name) for name in request_ids]
        unknown = [name for name, one in zip(request_ids, requests) if not one or is_hidden(one)]
        if unknown:
            raise EC2ClientError(
                "InvalidSpotInstanceRequestID.NotFound", f"The spot instance request ID '{unknown[0]}' does not exist"
            )
        for request in requests:
            request.state, request.status_code = "cancelled", "request-canceled-and-instance-running"
        return requests

    def is_hidden(request: Any) -> bool:
        return is_late(cloud.options, "list_lag", request.instance)

    def describe_spot_instance_requests(self: Any, *arguments: Any, **keywords: Any) -> list[Any]:
        return [request for request in plain_list(self, *arguments, **keywords) if not is_hidden(request)]

    SpotRequestBackend.describe_spot_instance_requests = describe_spot_instance_requests
    SpotInstances.describe_spot_price_history = describe_spot_price_history
    SpotRequestBackend.cancel_spot_instance_requests = cancel_spot_instance_requests


def make_spot_requests(response: Any, reservation: Any) -> None:
    """Record a spot request for each instance of a spot launch, as AWS does (moto: none)."""
    from moto.core.utils import utcnow
    from moto.ec2.models.spot_requests import SpotInstanceRequest
    from moto.ec2.utils import random_spot_request_id

    class FulfilledRequest(SpotInstanceRequest):
        __module__ = "moto.ec2.models.spot_requests"
        status_code = "fulfilled"

        def __init__(self, instance: Any, price: str, tags: dict[str, str]) -> None:
            self.ec2_backend = instance.ec2_backend
            self.id = random_spot_request_id()
            self.instance = instance
            self.state, self.type = "active", "one-time"
            self.status_message = ""
            self.price = price
            self.spot_price_text = price
            self.instance_interruption_behaviour = "terminate"
            self.launched = utcnow()
            self.valid_from = self.valid_until = None
            self.launch_group = self.availability_zone_group = None
            self.launch_specification = None
            self.add_tags(tags)

        @property
        def status(self) -> dict[str, Any]:
            return {"Code": self.status_code, "Message": "", "UpdateTime": self.launched}

        @property
        def create_time(self) -> Any:
            return self.launched

    tags = response._parse_tag_specification().get("spot-instances-request", {})
    options = (response.params.get("InstanceMarketOptions") or {}).get("SpotOptions") or {}
    for instance in reservation.instances:
        request = FulfilledRequest(
            instance, str(options.get("MaxPrice") or RATES.get(instance.instance_type, 0.1)), tags
        )
        instance.ec2_backend.spot_instance_requests[request.id] = request
        instance.spot_instance_request_id = request.id
        instance.instance_lifecycle = "spot"
        instance.lifecycle = "spot"


def seed_parameters() -> None:
    """Canonical's public SSM parameters, in each region that has a local counterpart."""
    from moto.ssm.models import Parameter, ssm_backends

    releases = (("22.04", "gp2", JAMMY), ("24.04", "gp3", NOBLE), ("26.04", "gp3", RESOLUTE))
    for region in (REGION, "us-west-2", "eu-west-1"):
        parameters: Any = ssm_backends[ACCOUNT][region]._parameters
        for release, disk, image_id in releases:
            name = f"/aws/service/canonical/ubuntu/server/{release}/stable/current/amd64/hvm/ebs-{disk}/ami-id"
            parameters[name].append(
                Parameter(ACCOUNT, name, image_id, "String", None, None, None, datetime.now(), 1, "aws:ec2:image")
            )


def tags_of(name: str) -> dict[str, str]:
    """Return the tags of an EC2 resource of this cloud's region."""
    from moto.ec2.models import ec2_backends

    return dict(ec2_backends[ACCOUNT][REGION].tags.get(name, {}))


def tagged(backend: Any, thing: Any, group: str) -> bool:
    """Tell whether an EC2 resource has the tag of GROUP."""
    return bool(backend.tags.get(thing.id, {}).get("mitsuba-group") == group)


def group_of(cloud: Cloud, group: str) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """Return the instances, and the (backend, security group) pairs, that have the tag of GROUP, in all regions."""
    from moto.ec2.models import ec2_backends

    instances = [one for one in list(cloud.instances.values()) if tagged(one.ec2_backend, one, group)]
    backends = list(ec2_backends[ACCOUNT].values())
    groups = [(back, one) for back in backends for vpc in list(back.groups.values()) for one in list(vpc.values())]
    return instances, [(back, one) for back, one in groups if tagged(back, one, group)]


def wipe(cloud: Cloud, group: str) -> int:
    """End all that has the tag of GROUP at once, past AWS's delays; return how many instances it was."""
    instances, security_groups = group_of(cloud, group)
    for one in instances:
        one.vanish()
    for backend, one in security_groups:
        backend.groups[one.vpc_id].pop(one.id, None)
        backend.tags.pop(one.id, None)
    return len(instances)


def truth(cloud: Cloud, group: str) -> dict[str, Any]:
    """Return what there is of GROUP, whether lists show it yet or not: states by instance id, security groups."""
    instances, security_groups = group_of(cloud, group)
    return {"instances": {one.id: one.state for one in instances}, "groups": [one.id for _, one in security_groups]}


def firewall_rules(instance: Any, instances: dict[str, Any]) -> str:
    """Return an instance's security groups as nftables rules for its own namespace."""
    members: dict[str, list[str]] = defaultdict(list)
    for other in list(instances.values()):
        if other.state in ALIVE:
            for group in other.held_groups:
                members[group.id].append(other.private_ip)
    lines = ["iif lo accept", "ct state established,related accept", "ip saddr { 169.254.169.254, 172.31.0.2 } accept"]
    for group in instance.held_groups:
        for rule in group.ingress_rules:
            what = "" if rule.ip_protocol == "-1" else f"{rule.ip_protocol} dport {rule.from_port}-{rule.to_port} "
            if source := rule.ip_range.get("CidrIp"):
                lines.append(f"ip saddr {source} {what}accept")
            if peers := members.get(rule.source_group.get("GroupId", "")):
                lines.append(f"ip saddr {{ {', '.join(sorted(peers))} }} {what}accept")
    chain = "\n    ".join(["type filter hook input priority 0; policy drop;", *lines])
    return f"table inet sg\ndelete table inet sg\ntable inet sg {{\n  chain input {{\n    {chain}\n  }}\n}}"
