"""What a picture is rewarded for."""
