package machine

import (
	"bytes"
	"context"
	"os/exec"
	"regexp"
	"runtime"

	"golang.org/x/sys/unix"
)

var platformUUID = regexp.MustCompile(`"IOPlatformUUID" = "([^"]+)"`)

// own is the id of the hardware.
func own() string {
	ctx, cancel := context.WithTimeout(context.Background(), toolWait)
	defer cancel()
	out, err := exec.CommandContext(ctx, "/usr/sbin/ioreg", "-rd1", "-c", "IOPlatformExpertDevice").Output()
	if err != nil {
		return ""
	}
	if m := platformUUID.FindSubmatch(out); m != nil {
		return string(bytes.TrimSpace(m[1]))
	}
	return ""
}

func ram() int64 {
	n, err := unix.SysctlUint64("hw.memsize")
	if err != nil {
		return 0
	}
	return int64(n >> 20)
}

func system() string {
	version, err := unix.Sysctl("kern.osproductversion")
	if err != nil {
		return ""
	}
	return "macOS " + version + " "
}

// others are the GPUs of Apple's own processors, which share the machine's memory.
func others() []gpu {
	name, err := unix.Sysctl("machdep.cpu.brand_string")
	if err != nil || runtime.GOARCH != "arm64" {
		return nil
	}
	return []gpu{{name, ram()}}
}
