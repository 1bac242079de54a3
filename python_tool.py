"""
The program in which a model's Python code runs. It shuts itself in, then runs what stdin holds.

    echo "6 * 7" | python -I -S python_tool.py      # prints 42
    python -I -S python_tool.py --probe             # prints what is missing: locks|limits

    in:  code on stdin      out: what it printed, and the value of a last line that is an expression

Three layers, from the inside out:
    a guard    an audit hook of Python that refuses files, the network and processes. It keeps
               accidents small, but code that means ill can switch it off.
    the locks  Landlock and seccomp, two parts of the Linux kernel that a process can turn on for
               itself and that nothing turns off: no file outside of Python's library is opened, and
               system calls for the network, for other processes and for settings fail.
    bubblewrap sample.py starts this program in it where it is installed: there are no other files
               and processes to be seen, and no network.
Under the locks alone, names and sizes of files can still be asked for.

Sources: Linux Documentation, userspace-api/landlock.rst and seccomp_filter.rst.
"""
import ast
import ctypes
import os
import struct
import sys

# ---- The kernel's locks --------------------------------------------------------------------------

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}      # column below, AUDIT_ARCH
LAST_KNOWN = 450        # later system calls are denied: nobody has looked at what they open up

DENIED = {              # system call: its number on x86-64, on arm64; None: it is not there
    # the network
    "socket": (41, 198), "socketpair": (53, 199),
    # other processes; clone stays, for threads
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "vhangup": (153, 58),
    "setsid": (112, 157), "setpgid": (109, 154), "prctl": (157, 167),
    # limits, priorities, identities
    "setrlimit": (160, 164), "prlimit64": (302, 261), "setpriority": (141, 140),
    "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122), "ioprio_set": (251, 30), "setuid": (105, 146),
    "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143), "setresuid": (117, 147),
    "setresgid": (119, 149), "setgroups": (116, 159), "setfsuid": (122, 151),
    "setfsgid": (123, 152), "capset": (126, 91), "personality": (135, 92),
    # what Landlock does not cover of files: modes, owners, times, attributes, special files
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "mknod": (133, None),
    "mknodat": (259, 33), "truncate": (76, 45),
    "open_by_handle_at": (304, 265), "fanotify_init": (300, 262), "inotify_init": (253, None),
    "inotify_init1": (294, 26), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # memory that processes share
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180),
    # the system
    "chroot": (161, 51), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "swapon": (167, 224), "swapoff": (168, 225), "reboot": (169, 142),
    "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "iopl": (172, None),
    "ioperm": (173, None), "bpf": (321, 280), "perf_event_open": (298, 241), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)}
CLONE = (56, 220)
CLONE3 = (435, 435)
CLONE_THREAD = 0x10000

# The last one is the folder it starts in, which sample.py makes and which is empty
READABLE = (sys.base_prefix, "/usr/lib", "/usr/share/zoneinfo", "/lib", "/lib64", "/dev/null",
            "/dev/urandom", ".")

# Instructions of the packet filter, and what it can answer
LOAD = 0x20
EQUAL = 0x15
AT_LEAST = 0x35
ANY_BIT = 0x45
RETURN = 0x06
ALLOW = 0x7FFF0000
DENY = 0x00050001               # the call fails with EPERM
NO_SUCH_CALL = 0x00050026       # ENOSYS
KILL = 0x80000000

def lock():
    """Shuts this process in for good → None, or what this machine lacks, as a text."""
    if sys.platform != "linux":
        return f"no locks are known for {sys.platform}"
    machine = os.uname().machine
    if machine not in MACHINES or struct.calcsize("P") != 8:
        return f"no locks are known for Linux on {machine}"
    column, architecture = MACHINES[machine]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):                          # PR_SET_NO_NEW_PRIVS
        return "the kernel refuses no_new_privs"
    return lock_files(libc) or lock_system_calls(libc, column, architecture)

def lock_files(libc):
    """Landlock: of all files, those of Python and its libraries may be read → None or what is
    missing."""
    abi = libc.syscall(444, None, 0, 1)                     # landlock_create_ruleset: its version
    if abi < 1:
        return "the kernel has no Landlock"
    rights = 13                                             # bits for files in the first version
    if abi >= 2:
        rights = {2: 14, 3: 15, 4: 15}.get(abi, 16)
    ruleset = struct.pack("<Q", (1 << rights) - 1)
    if abi >= 4:
        ruleset += struct.pack("<Q", 3)                     # no TCP: neither bind nor connect
    if abi >= 6:
        ruleset += struct.pack("<Q", 3)                     # no abstract sockets, no signals
    rules = libc.syscall(444, ruleset, len(ruleset), 0)
    if rules < 0:
        return f"Landlock fails: {os.strerror(ctypes.get_errno())}"
    read_file = 1 << 2
    read_folder = 1 << 3
    for path in READABLE:
        if os.path.exists(path):
            handle = os.open(path, os.O_PATH)
            allowed = read_file
            if os.path.isdir(path):
                allowed |= read_folder
            libc.syscall(445, rules, 1, struct.pack("<Qi", allowed, handle), 0)     # …_add_rule
            os.close(handle)
    if libc.syscall(446, rules, 0):                         # landlock_restrict_self
        return f"Landlock fails: {os.strerror(ctypes.get_errno())}"
    os.close(rules)
    return None

def lock_system_calls(libc, column, architecture):
    """seccomp: a program of the kernel's packet filter looks at each system call → None or what is
    missing. An instruction is (code, how many to skip if true, if false, operand)."""
    program = [
        (LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),                                    # the number of the call
        (EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, NO_SUCH_CALL),    # libc then takes clone
        (EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, 16),     # clone's flags: only for threads
        (ANY_BIT, 0, 1, CLONE_THREAD), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY),
        (AT_LEAST, 0, 1, LAST_KNOWN + 1), (RETURN, 0, 0, DENY)]
    for numbers in DENIED.values():
        if numbers[column] is not None:
            program += [(EQUAL, 0, 1, numbers[column]), (RETURN, 0, 0, DENY)]
    program.append((RETURN, 0, 0, ALLOW))
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    description = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    if libc.prctl(22, 2, description, 0, 0):                # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        return f"seccomp fails: {os.strerror(ctypes.get_errno())}"
    return None

# ---- The guard -----------------------------------------------------------------------------------

FORBIDDEN = ("socket", "subprocess", "os", "shutil", "ctypes", "signal", "sqlite3", "resource",
             "pty", "fcntl", "mmap", "gc", "cpython", "_posixsubprocess")
HARMLESS = ("os.listdir", "os.scandir")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def guard(event, args):
    """An audit hook: Python tells it what is about to happen, and an error prevents that."""
    if event == "open":
        path, mode, open_flags = args
        writes = set(str(mode)) & set("wax+") or (open_flags or 0) & WRITE_FLAGS
        outside = ".." in str(path) or not str(path).startswith(sys.base_prefix)
        forbidden = writes or outside
    else:
        forbidden = event.split(".")[0] in FORBIDDEN and event not in HARMLESS
    if forbidden:
        raise PermissionError(f"{event} is not allowed in the Python tool")

LIMITS = dict(RLIMIT_CPU="processor time", RLIMIT_AS="memory", RLIMIT_FSIZE="output")

def missing_limits():
    """Which of sample.py's limits do not hold for this process, as a text. Windows has none, and
    macOS refuses the one of memory. The time that passes is always limited, by the parent."""
    try:
        import resource
    except ImportError:
        return ", ".join(LIMITS.values())
    return ", ".join(name for key, name in LIMITS.items()
                     if resource.getrlimit(getattr(resource, key))[0] == resource.RLIM_INFINITY)

# ---- Running the code ----------------------------------------------------------------------------

def run(code):
    """Runs the code as a notebook does: if it ends with an expression, its value is printed."""
    names = {"__name__": "__main__"}
    statements = ast.parse(code, "<python>").body
    last = None
    if statements and isinstance(statements[-1], ast.Expr):
        last = ast.Expression(statements.pop().value)
    exec(compile(ast.Module(statements, []), "<python>", "exec"), names)
    if last:
        value = eval(compile(last, "<python>", "eval"), names)
        if value is not None:
            print(value)

def main():
    unlimited = missing_limits()        # first, because the locks let nobody ask for limits
    problem = lock()
    if "--probe" in sys.argv:
        print(f"{problem or ''}|{unlimited}")
        return
    code = sys.stdin.read()
    sys.addaudithook(guard)
    run(code.strip())

if __name__ == "__main__":
    main()
