package machine

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// own is the id of the operating system. An installation that wasn't started yet has
// "uninitialized".
func own() string {
	if id := firstLine("/etc/machine-id", "/var/lib/dbus/machine-id"); id != "uninitialized" {
		return id
	}
	return ""
}

func ram() int64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	return parseMeminfo(string(b))
}

// parseMeminfo reads a line like "MemTotal:       65536000 kB".
func parseMeminfo(text string) int64 {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 3 && fields[0] == "MemTotal:" && fields[2] == "kB" {
			kb, err := strconv.ParseInt(fields[1], 10, 64)
			if err != nil {
				return 0
			}
			return kb >> 10
		}
	}
	return 0
}

// system is the name of the distribution, with a space behind it.
func system() string {
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME="); ok {
			if name = strings.Trim(name, `"'`); name != "" {
				return strings.ToValidUTF8(name[:min(len(name), maxFact/2)], "") + " "
			}
		}
	}
	return ""
}

// others are the GPUs that the kernel tells of: those of AMD.
func others() []gpu { return amd("/sys/class/drm") }

func amd(root string) (gpus []gpu) {
	cards, _ := filepath.Glob(filepath.Join(root, "card*", "device", "mem_info_vram_total"))
	for _, file := range cards {
		bytes, err := strconv.ParseInt(firstLine(file), 10, 64)
		if err != nil || bytes <= 0 {
			continue
		}
		name := "AMD GPU"
		if product := firstLine(filepath.Join(filepath.Dir(file), "product_name")); product != "" {
			name = product
		}
		gpus = append(gpus, gpu{name, bytes >> 20})
	}
	return gpus
}
